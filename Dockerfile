FROM python:3.12-slim

# The extras of the image. The reconciler and the dashboard need no queue library; workers need theirs, and
# the demo needs "rq,embedded".
ARG EXTRAS=rq,binary,dashboard,encrypt,metrics

RUN useradd --create-home --uid 1000 jobguard
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY schema schema
COPY demo demo
COPY jobguard jobguard
RUN pip install --no-cache-dir ".[${EXTRAS}]"

USER jobguard
WORKDIR /home/jobguard

# The reconciler. Other commands of the image switch the check off.
EXPOSE 9912
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", \
  "import urllib.request as u; u.urlopen('http://127.0.0.1:9912/livez', timeout=4)"]
CMD ["jobguard", "reconcile", "--http", "0.0.0.0:9912"]
