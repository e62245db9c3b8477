# moderato on a CPU: worker, trainer and every command, in one image.
#
#   docker build -t moderato:cpu --build-arg TORCH_INDEX_URL=URL .
#
# URL is the package index of torch's builds for a CPU, as pytorch.org's "Get Started" names it. Without it the image gets
# the ordinary build, which runs on a CPU as well and brings some GB of CUDA along.

ARG PYTHON_TAG=3.11-slim-bookworm

FROM python:${PYTHON_TAG} AS build
WORKDIR /app
ARG TORCH_INDEX_URL=""
# Without pip of its own: what is installed there is what runs. The outer pip installs into it.
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml requirements.lock ./
# What pyproject.toml asks for at run time, and what that needs, each at the version that requirements.lock pins; none of
# the lock's other packages, which are for tests.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/runtime.txt \
    && if [ -n "$TORCH_INDEX_URL" ]; then \
        pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" \
            "$(grep '^torch==' requirements.lock)"; \
    fi \
    && pip --python /opt/venv/bin/python install --no-cache-dir -c requirements.lock -r /tmp/runtime.txt
COPY . .
# Editable, as `make` does it: the project runs from its folder.
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-build-isolation -e . \
    && python -m compileall -q .

FROM python:${PYTHON_TAG}
# The number is also what `user` in docker-compose.yml says.
RUN groupadd --gid 10001 moderato \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin moderato \
    # A new volume takes owner and mode from the folder it is mounted on.
    && install -d -o moderato -g moderato /app/var /srv/moderato/versions
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    # Where nothing but /tmp and /app/var can be written to.
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/app/var/huggingface \
    # As the code sets them (model/__init__.py), for whatever else is run in the image: nothing is sent to libraries' makers.
    ORT_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_UPDATE_CHECK=1 \
    DO_NOT_TRACK=1 \
    MODERATO_VERSIONS_DIR=/srv/moderato/versions \
    MODERATO_LOG_FORMAT=json \
    # On every address of the container, whose ports nobody reaches but its own networks.
    MODERATO_METRICS__HOST=0.0.0.0 \
    MODERATO_METRICS__WORKER_PORT=9464 \
    MODERATO_METRICS__TRAINER_PORT=9465 \
    MODERATO_METRICS__WEBHOOKS_PORT=9466
EXPOSE 9464 9465 9466
USER 10001:10001
# The worker scores a comment to answer; it is given 15 s for it.
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --retries=3 CMD ["moderato", "health"]
# In the form of a list: the signals that stop a container reach Celery, not a shell before it.
CMD ["celery", "-A", "worker", "worker", "-Q", "toxicity.interactive,toxicity,toxicity.bulk", "-n", "worker@%h", "--loglevel", "INFO"]
