"""The stores: the protocols, and PostgreSQL behind them, one file for each role."""
