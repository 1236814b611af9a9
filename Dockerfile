FROM python:3.12-slim

# The extras of the image: "rq,binary" for workers and the reconciler, "rq,embedded" for the demo.
ARG EXTRAS=rq,binary

RUN useradd --create-home jobguard
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY schema schema
COPY demo demo
COPY jobguard jobguard
RUN pip install --no-cache-dir ".[${EXTRAS}]"

USER jobguard
WORKDIR /home/jobguard
CMD ["jobguard", "--help"]
