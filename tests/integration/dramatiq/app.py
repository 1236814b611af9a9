"""The module that the command `dramatiq` imports."""

from __future__ import annotations

from dramatiq import set_broker

from tests.integration.dramatiq.stage import the_stage

stage = the_stage()
broker = stage.broker
set_broker(broker)
