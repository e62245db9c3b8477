"""LitServe with dynamic batching: `python -m bench.rivals.litserve_server`."""

import os
from typing import Any

from litserve import LitAPI, LitServer

from bench.engines import load_int8
from config.names import LABELS


class Moderate(LitAPI):
    def setup(self, device: str) -> None:
        self._model = load_int8(int(os.environ["RIVAL_THREADS"]), sort=os.environ["RIVAL_SORT"] == "True")

    def decode_request(self, request: dict[str, Any]) -> str:
        text: str = request["text"]
        return text

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, x: list[str]) -> list[list[float]]:
        scores: list[list[float]] = self._model(x).tolist()
        return scores

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, float]:
        return dict(zip(LABELS, output, strict=True))


if __name__ == "__main__":
    api = Moderate(
        max_batch_size=int(os.environ["RIVAL_MAX_BATCH_SIZE"]),
        batch_timeout=int(os.environ["RIVAL_MAX_WAIT_MS"]) / 1000,
        api_path="/inference",
    )
    server = LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["RIVAL_PROCESSES"]), timeout=60)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["RIVAL_PORT"]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
