# SPDX-License-Identifier: Apache-2.0
"""Tests of a pruned model behind vLLM's OpenAI-compatible server, over HTTP."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

from vllm_tests import models, pictures  # noqa: E402

from benchmarks.vllm_server import Server, ServerError  # noqa: E402
from vtprune.integrations.vllm.settings import parse  # noqa: E402

pytestmark = pytest.mark.slow
CONFIG, KEEP = {"method": "divprune", "ratio": 0.25}, {"method": "uniform", "keep": 8}
OPTIONS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16")
OPTIONS += ("--limit-mm-per-prompt", '{"image": 4}')
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
# Width and height of each request's pictures.
REQUESTS = {"none": [], "one": [(96, 64)], "small": [(32, 32)], "two": [(64, 64), (40, 96)], "four": [(96, 96)] * 4}


# Invalid requests that vLLM, pruned or not, answers with status 500, and its reasons.
OWN_ERRORS = {"a large claim": "exceeds limit", "another scheme": "Cannot load local files"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("server") / "idefics3"
    models.MODELS["idefics3"](place)
    return place


@pytest.fixture(scope="module")
def unpruned(model: Path) -> dict[str, Any]:
    """Answers and refusals of an unpruned server, which is stopped before the pruned one starts."""
    with Server(model, options=OPTIONS, environment=SMALL) as server:
        answers = {name: ask(server, *images(sizes)) for name, sizes in REQUESTS.items()}
        return answers | {name: refusal(server, url) for name, url in pictures.broken().items()}


@pytest.fixture(scope="module")
def server(model: Path, unpruned: dict[str, Any]) -> Iterator[Server]:
    with Server(model, CONFIG, options=OPTIONS, environment=SMALL) as server:
        yield server


def images(sizes: list[tuple[int, int]], seed: int = 0) -> list[str]:
    return [pictures.url(pictures.encoded(pictures.noise(seed + i, *size))) for i, size in enumerate(sizes)]


def request(server: Server, urls: tuple[str, ...], tokens: int = 8) -> dict[str, Any]:
    """Parameters of a chat completion with pictures before the text."""
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "word1 word2 word3"}]}]
    return {"model": server.model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def client(server: Server, kind: str = "OpenAI") -> Any:
    http = {"OpenAI": openai.DefaultHttpxClient, "AsyncOpenAI": openai.DefaultAsyncHttpxClient}[kind]
    return getattr(openai, kind)(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http(trust_env=False)
    )


def ask(server: Server, *urls: str) -> Any:
    with client(server) as asking:
        return asking.chat.completions.create(**request(server, urls), extra_body={"ignore_eos": True})


def refusal(server: Server, url: str) -> tuple[int, str]:
    """Status and message of a request that fails."""
    with pytest.raises(openai.APIStatusError) as error:
        ask(server, url)
    return error.value.status_code, error.value.message


def reply(answer: Any) -> tuple[int, str]:
    return answer.usage.prompt_tokens, answer.choices[0].message.content


def dropped(model: Path, sizes: list[tuple[int, int]], config: dict[str, Any] = CONFIG) -> int:
    """Number of dropped tokens, from the transformers processor and the settings."""
    from transformers import AutoProcessor

    processor, settings = AutoProcessor.from_pretrained(model), parse(config)
    token, total = processor.tokenizer.convert_tokens_to_ids("<image>"), 0
    for seed, size in enumerate(sizes):
        ids = processor(images=[pictures.noise(seed, *size)], text="<image>")["input_ids"][0]
        runs = [len(run) for run in "".join("x" if i == token else " " for i in ids).split()]
        total += sum(runs) - sum(settings.counts(runs))
    return total


@pytest.mark.parametrize("name", REQUESTS)
def test_usage_is_lower_by_the_dropped_tokens(name, model, server, unpruned):
    before, after = unpruned[name].usage, ask(server, *images(REQUESTS[name])).usage
    assert before.prompt_tokens - after.prompt_tokens == dropped(model, REQUESTS[name])
    assert after.total_tokens == after.prompt_tokens + after.completion_tokens
    assert after.completion_tokens == before.completion_tokens == 8


def test_text_alone_is_answered_as_ever(server, unpruned):
    assert reply(ask(server)) == reply(unpruned["none"])


def test_pictures_are_looked_at(server):
    """Other pictures of equal size change the answer; the same ones, from the caches, repeat it."""
    answers = [reply(ask(server, *images([(64, 64)], seed))) for seed in (10, 11, 12, 10)]
    assert len({length for length, _ in answers}) == 1
    assert len({text for _, text in answers}) == 3 and answers[0] == answers[3]


def test_sixteen_at_once_say_what_they_say_alone(server):
    sizes = [(32, 32), (96, 64), (50, 90), (64, 64)]
    asked = [tuple(images(sizes[i % 4 : i % 4 + 1 + i % 2], 100 + 2 * i)) for i in range(15)] + [()]

    async def together() -> list[Any]:
        async with client(server, "AsyncOpenAI") as asking:
            calls = [asking.chat.completions.create(**request(server, urls)) for urls in asked]
            return await asyncio.gather(*calls)

    crowd = [reply(answer) for answer in asyncio.run(together())]
    # A cache salt keeps the single requests from reusing blocks of the batch; the cache is too large for evictions.
    alone = [reply(ask_once(server, urls)) for urls in asked]
    assert crowd == alone and len(set(crowd)) == 16


def ask_once(server: Server, urls: tuple[str, ...]) -> Any:
    """Sends a request with a cache salt, so that no block of an earlier prompt is reused."""
    with client(server) as asking:
        return asking.chat.completions.create(**request(server, urls), extra_body={"cache_salt": "alone"})


def test_streams_end_with_the_same_usage(server):
    with client(server) as asking:
        body = request(server, tuple(images(REQUESTS["one"])))
        parts = list(asking.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        whole = asking.chat.completions.create(**body)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert (parts[-1].usage.prompt_tokens, text) == reply(whole)


@pytest.mark.parametrize("name", pictures.odd())
def test_odd_pictures_are_answered(name, server):
    assert ask(server, pictures.odd()[name]).usage.prompt_tokens > 20


@pytest.mark.parametrize("name", pictures.broken())
def test_broken_pictures_are_refused_and_the_server_goes_on(name, server, unpruned):
    before = reply(ask(server, *images([(64, 64)])))
    status, message = refusal(server, pictures.broken()[name])
    assert (status, message) == unpruned[name]
    assert 400 <= status < 500 or OWN_ERRORS.get(name, "-") in message, message
    assert server.ready() and reply(ask(server, *images([(64, 64)]))) == before


def test_broken_ones_among_sixteen_harm_only_themselves(server):
    good, bad = tuple(images([(64, 64)], 300)), (pictures.broken()["truncated"],)

    async def together() -> list[Any]:
        async with client(server, "AsyncOpenAI") as asking:
            calls = [asking.chat.completions.create(**request(server, bad if i % 3 else good)) for i in range(16)]
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(together())
    assert [isinstance(answer, openai.BadRequestError) for answer in answers] == [bool(i % 3) for i in range(16)]
    assert len({reply(answer) for answer in answers[::3]}) == 1


def test_too_many_pictures_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="4"):
        ask(server, *images([(32, 32)] * 5))


def test_requests_that_clients_leave_are_forgotten(server):
    async def leave() -> None:
        async with client(server, "AsyncOpenAI") as asking:
            body = request(server, tuple(images([(96, 96)], 400)), tokens=400)
            stream = await asking.chat.completions.create(**body, stream=True, extra_body={"ignore_eos": True})
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(leave())
    ask(server, *images([(96, 96)], 500))
    assert server.metrics()["vllm:num_requests_running"] == 0


def test_two_replicas_answer_as_one(model: Path, server: Server) -> None:
    """With data parallelism, eight concurrent requests on two engines are answered as on one."""
    urls = [images([(64, 64)], seed=i)[0] for i in range(8)]
    wanted = [reply(ask(server, url)) for url in urls]
    options = (*OPTIONS, "--data-parallel-size", "2")
    environment = {**SMALL, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with Server(model, CONFIG, options=options, environment=environment) as two, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda url: reply(ask(two, url)), urls)) == wanted
        text = openai.DefaultHttpxClient(trust_env=False).get(f"{two.url}/metrics").text
    work = re.findall(r'^vllm:prompt_tokens_total\{engine="(\d)".*\} (\S+)$', text, re.M)
    assert [engine for engine, tokens in work if float(tokens) > 0] == ["0", "1"], work


def test_it_stops_when_it_is_terminated(server):
    """SIGTERM between two requests stops the server cleanly (the last test that uses this server)."""
    assert server.stop(signal.SIGTERM) == 0, server.tail()
    assert not server.ready() and server.left() == []
    # vLLM may log that its engine is gone; the plug-in must log nothing.
    assert "vtprune/" not in server.log.read_text().rpartition("shutdown triggered")[2], server.tail(80)


def test_a_count_holds_for_every_picture_and_ctrl_c_stops_the_server(model, unpruned):
    """`keep` applies to every picture, and Ctrl-C between two requests stops the server."""
    with Server(model, KEEP, options=OPTIONS, environment=SMALL) as server:
        for name in ("one", "four"):
            before, after = unpruned[name].usage.prompt_tokens, reply(ask(server, *images(REQUESTS[name])))[0]
            assert before - after == dropped(model, REQUESTS[name], KEEP)
        assert server.stop(signal.SIGINT) == 0, server.tail()
        assert server.left() == []


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"ration": 0.25}, "vtprune: unknown field 'ration'; expected method, ratio, keep, options"),
        ({"method": "fastv", "ratio": 0.5}, "vtprune: method fastv is not available in vLLM; there are divprune"),
    ],
)
def test_bad_configuration_ends_the_start_with_one_line(config, line, model):
    with pytest.raises(ServerError) as error, Server(model, config, options=OPTIONS, environment=SMALL):
        pass
    assert str(error.value).splitlines()[-1].startswith(line)
    assert "Traceback" not in str(error.value) and "ended with 1:" in str(error.value)
