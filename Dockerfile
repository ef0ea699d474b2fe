# docker build --tag savings-exporter . && docker run --volume savings:/data --publish 127.0.0.1:9478:9478 savings-exporter
FROM python:3.13.7-slim-bookworm AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY dashboards dashboards
COPY deploy deploy
COPY docs docs
COPY savings_exporter savings_exporter
RUN python -m venv /opt/venv && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check '.[prices]'

FROM python:3.13.7-slim-bookworm
# The user id is fixed, so that the files in a volume keep their owner when the image is updated.
RUN groupadd --gid 9478 savings \
    && useradd --uid 9478 --gid 9478 --no-create-home --home-dir /data savings \
    && install --directory --owner savings --group savings --mode 0750 /data
COPY --from=build /opt/venv /opt/venv

# Variables instead of arguments, so that "docker exec ... savings-exporter show" uses the same store.
ENV PATH=/opt/venv/bin:$PATH
ENV SAVINGS_EXPORTER_STORE=/data/proxy_savings.json
ENV SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS=0.0.0.0:9478
# Who can reach the service is decided by the networks and the published ports of the container.
ENV SAVINGS_EXPORTER_WEB_ALLOW_INSECURE=true

USER 9478:9478
VOLUME ["/data"]
EXPOSE 9478
# Checks /-/ready, not /-/healthy: while the disk fails, savings are pending in memory, and a restart would lose them.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["savings-exporter", "ready"]
ENTRYPOINT ["savings-exporter"]
CMD ["serve"]
