# A dbt project to be traced: the one of the end-to-end tests. Nothing in this image knows of floe-agent.
#   docker build -f deploy/harness/demo.Dockerfile -t floe-demo .
FROM python:3.12-slim
COPY tests/fixtures/requirements/dbt-1.10.txt /tmp/requirements.txt
RUN pip install --no-cache-dir -r /tmp/requirements.txt
COPY tests/fixtures/dbt /project
WORKDIR /project
ENV DBT_PROFILES_DIR=/project
CMD ["dbt", "build"]
