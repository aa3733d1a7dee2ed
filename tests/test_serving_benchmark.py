# SPDX-License-Identifier: Apache-2.0
"""The benchmark of serving, with a fake vLLM: order of runs, resuming, metrics, tables."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

import pytest

from benchmarks import report, serving, serving_load, serving_table, vllm_server
from vtprune.study import progress

METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0"} 3.0
vllm:prompt_tokens_total{engine="1"} 4.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="200"} 1.0
python_info{version="3"} 1.0
"""


class FakeServer:
    """A server that is ready at once and records its events."""

    events: list[tuple[str, Any]] = []

    def __init__(self, model: str, config: Any, *, options: Any) -> None:
        self.config = config

    def start(self) -> FakeServer:
        self.events.append(("start", self.config))
        return self

    def wait(self) -> FakeServer:
        return self

    def close(self) -> None:
        pass

    def stop(self) -> None:
        self.events.append(("stop", self.config))


def _row(first: float, rate: float, tokens: int) -> dict[str, Any]:
    spread = {"median": first, "p95": 2 * first}
    row = {"requests": 6, "seconds": 6 / rate, "requests_per_second": rate, "first": spread, "token": spread}
    return {**row, "prompt_tokens": tokens, "peak_kv_tokens": 2 * tokens}


@pytest.fixture
def plan(monkeypatch) -> serving.Plan:
    FakeServer.events = []

    def run(server: FakeServer, urls: list[str], clients: int, tokens: int) -> dict[str, Any]:
        FakeServer.events.append(("run", clients))
        return _row(1.0, 1.0, 900) if server.config is None else _row(0.25, 3.0, 300)

    def parts(plan: serving.Plan, model: str, variant: str) -> dict[str, Any]:
        selection = 0.0 if variant == "unpruned" else 0.1
        own = {"preparing": 0.1, "encoder": 0.2, "selection": selection, "decoder": 0.8 - 5 * selection, "all": 1.2}
        return {"alone": own, "together": own}

    monkeypatch.setattr(serving, "Server", FakeServer)
    monkeypatch.setattr(serving_load, "run", run)
    monkeypatch.setattr(serving, "_parts", parts)
    return serving.Plan(model="FOLDER", concurrencies=(1, 8), rounds=2)


def test_ways_take_turns_and_servers_start_once(plan):
    data = serving.measure(plan, None)
    assert [(row["round"], row["variant"], row["concurrency"]) for row in data["rows"]][:4] == [
        (0, "unpruned", 1), (0, "divprune 0.25", 1), (0, "unpruned", 8), (0, "divprune 0.25", 8),
    ]  # fmt: skip
    pruned = {"method": "divprune", "ratio": 0.25}
    assert [event for event in FakeServer.events if event[0] == "start"] == [("start", None), ("start", pruned)]
    assert FakeServer.events[-2:] == [("stop", None), ("stop", pruned)]  # no server runs while the engine is timed
    assert set(data["parts"]) == {"unpruned", "divprune 0.25"} and len(data["rows"]) == 8


def test_alone_means_one_server_at_a_time(plan):
    plan.alone = True
    serving.measure(plan, None)
    kinds = [kind for kind, _ in FakeServer.events if kind != "run"]
    assert kinds == ["start", "stop"] * 4


def test_an_interrupted_run_goes_on_and_others_are_refused(plan, tmp_path):
    out = tmp_path / "serving.json"
    whole = serving.measure(plan, out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(whole))
    cut = dict(whole, rows=whole["rows"][:5], parts={})
    progress.save(out, cut)
    FakeServer.events = []
    again = serving.measure(plan, out)
    assert again["rows"] == whole["rows"] and sum(kind == "run" for kind, _ in FakeServer.events) == 3 + 2  # warm-ups
    plan.tokens = 9
    with pytest.raises(progress.StaleResultError, match="tokens is 8 there and 9 here"):
        serving.measure(plan, out)


def test_no_picture_is_sent_twice():
    plan = serving.Plan(rounds=2, size=(8, 8))
    urls = [url for number in range(2) for clients in plan.concurrencies for url in plan.urls(number, clients)]
    assert len(set(urls)) == len(urls) == 2 * (6 + 8 + 32)


def test_tables_hold_values_and_ratios(plan):
    data = serving.measure(plan, None)
    rows = serving_table.load_rows(data)
    assert rows[0] == ("1", "unpruned", "900", "1.00", "1 s", "2 s", "1 s", "1,800")
    assert rows[1][1:5] == ("divprune 0.25", "300 (0.33)", "3.00 (3.00)", "250 ms (0.25)")
    assert serving_table.part_rows(data)[1][-1] == f"{100 * 0.1 / 1.2:.1f} %"
    assert serving_table.gains(data) == [("divprune 0.25", 3.0, pytest.approx(1.0 / 0.6))]
    text = serving_table.markdown(data)
    assert "| 8 | divprune 0.25 | 300 (0.33) | 3.00 (3.00) |" in text and "3.00 times the requests per second" in text
    assert report.section_of("serving-cpu.json").render is serving_table.markdown


def test_metrics_of_a_server_are_summed():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        server = vllm_server.Server.__new__(vllm_server.Server)
        server.port, server.listeners = listening.server_port, 1
        found = server.metrics()
        assert server.ready() and serving_load._kv_tokens(server) == 50 * 16
        listening.shutdown()
    assert found["vllm:prompt_tokens_total"] == 7 and found["num_gpu_blocks"] == 200 and "python_info" not in found
