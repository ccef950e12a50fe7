"""What a setting does to answers: nats per answer token over HTTP, a server's beside that of one without the setting.

python -m benchmarks.answer_nll --data DIR --flags '--quantization int8'    # DIR/TASK/validation.jsonl, chats

Teacher forcing: every chat is a prompt of token ids whose log probabilities are asked for. Under the bare base model,
under the adapter of the folder's name where one is served, and under `auto`.
"""

import argparse
import asyncio
import itertools
import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import serving

AT_ONCE = 8
"""Requests under way."""
TIMEOUT_S = 300.0


@dataclass
class Total:
    """Nats and answer tokens of some chats."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.nats / self.tokens


Totals = Mapping[tuple[str, str], Total]
"""By task and policy."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answer_nll", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folders of chats, named as adapters are"
    )
    parser.add_argument("--rows", type=int, default=40, help="chats of each task (default: %(default)s)")
    parser.add_argument("--flags", default="", help="what `lora-mixer serve` is given the second time")
    parser.add_argument("--common", default="", help="what it is given both times")
    options = parser.parse_args()
    chats = read_chats(options.data, options.rows)
    common, flags = shlex.split(options.common), shlex.split(options.flags)
    before, after = (asyncio.run(measure(chats, given)) for given in (common, [*common, *flags]))
    print(table(before, after))


def read_chats(folder: Path, rows: int) -> dict[str, list[list[dict[str, str]]]]:
    """The first chats of every task's validation file: messages whose last is an answer."""
    files = sorted(folder.glob("*/validation.jsonl"))
    if not files:
        raise SystemExit(f"{folder} has no folders with a validation.jsonl")
    return {
        path.parent.name: [
            json.loads(line)["messages"]
            for line in itertools.islice(path.read_text(encoding="utf-8").splitlines(), rows)
        ]
        for path in files
    }


async def measure(chats: Mapping[str, Sequence[list[dict[str, str]]]], flags: Sequence[str]) -> Totals:
    """Totals of one server's answers."""
    totals: dict[tuple[str, str], Total] = defaultdict(Total)
    slots = asyncio.Semaphore(AT_ONCE)
    async with (
        serving(flags) as server,
        httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client,
    ):
        models = {model["id"]: model for model in (await request(client, "GET", "/v1/models"))["data"]}
        served, base = list(models), models["auto"]["parent"]
        behind = await tokens_behind_the_end(client, base)

        async def add(task: str, messages: list[dict[str, str]], policy: str, model: str) -> None:
            async with slots:
                found = await answer_logprobs(client, model, messages, behind)
            totals[task, policy].nats -= sum(found)
            totals[task, policy].tokens += len(found)

        await asyncio.gather(
            *(
                add(task, messages, policy, model)
                for task, rows in chats.items()
                for policy, model in (("base", base), ("own adapter", task), ("auto", "auto"))
                if model in served
                for messages in rows
            )
        )
    return totals


async def tokens_behind_the_end(client: httpx.AsyncClient, model: str) -> int:
    """How many tokens the chat template puts behind the one that ends an answer, which nobody is asked for."""
    first, second = [
        await tokenized(
            client,
            model,
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}],
            is_asked=False,
        )
        for content in ("yes", "7")
    ]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(second), strict=False))
    return max(0, sum(1 for _ in same) - 1)


async def answer_logprobs(
    client: httpx.AsyncClient, model: str, messages: Sequence[Mapping[str, str]], behind: int
) -> list[float]:
    """Log probabilities of the tokens of the last message and of the one that ends it; `behind` more follow."""
    prompt = await tokenized(client, model, messages[:-1], is_asked=True)
    whole = await tokenized(client, model, messages, is_asked=False)
    body = {"model": model, "prompt": whole, "max_tokens": 1, "prompt_logprobs": 0}
    found = (await request(client, "POST", "/v1/completions", body))["choices"][0]["prompt_logprobs"]
    return [found[place][str(whole[place])]["logprob"] for place in range(len(prompt), len(whole) - behind)]


async def tokenized(
    client: httpx.AsyncClient, model: str, messages: Sequence[Mapping[str, str]], *, is_asked: bool
) -> list[int]:
    """The chat's tokens; `is_asked`: and the header of an answer to it."""
    body = {"model": model, "messages": list(messages), "add_generation_prompt": is_asked}
    tokens: list[int] = (await request(client, "POST", "/tokenize", body))["tokens"]
    return tokens


async def request(client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """The JSON answer. Raises SystemExit with the server's reason where it refuses."""
    response = await client.request(method, path, json=body)
    if response.is_error:
        raise SystemExit(f"{method} {path}: {response.status_code} {response.text}")
    content: dict[str, Any] = response.json()
    return content


def table(before: Totals, after: Totals) -> str:
    """Nats per answer token before, and the ratio after / before, by task and policy; last of the tasks' means."""
    policies, tasks = (list(dict.fromkeys(key[place] for key in before)) for place in (1, 0))
    rows = [[task] for task in tasks]
    last = ["mean"]
    for policy in policies:
        measured = [task for task in tasks if (task, policy) in before]
        old, new = ({task: side[task, policy].mean for task in measured} for side in (before, after))
        for row, task in zip(rows, tasks, strict=True):
            row += [f"{old[task]:.4f}", f"{new[task] / old[task]:.4f}"] if task in old else ["–", "–"]
        last += [f"{statistics.mean(old.values()):.4f}", f"{sum(new.values()) / sum(old.values()):.4f}"]
    header = ["task", *(text for policy in policies for text in (f"{policy}, before", "ratio"))]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows, last]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
