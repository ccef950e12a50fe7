"""A tiny world where calibration can succeed: a byte tokenizer, and a router with statistics of ordinary text."""

from typing import Any

import torch
from torch import Tensor

from server.routing.attach import RoutedModel
from server.routing.background import Background, summarise_gate, to_tensors
from server.routing.chat_frame import ChatFrame
from server.routing.prompt_gate import PromptGate
from server.routing.prompt_statistics import summarise_questions
from server.routing.recording import InputRecorder
from server.routing.router import RouterArtefact
from tests.adapters.harness import artefact_for

ORDINARY = ["abcdef ghijk", "bad cab fade", "high jack lime", "ebb and flow", "make a deal", "cold dime bag"]
"""What the trained adapters are for: two domains, by turns."""
OWN = ["xyzzy zzz xyz", "zyx yxz zz", "xxyyzz zyzx", "yzy xzx zyx", "zzxy xyyz", "xyx zyz yzx"]
"""What the newcomer is for."""


class ByteRenderer:
    """Chats to bytes: role markers, text, end markers. As prompts begin alike, `start` has something to find."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        tokens = [300, 301]
        for message in messages:
            tokens += [302 if message["role"] == "user" else 303, *message["content"].encode(), 304]
        return [*tokens, 303] if add_generation_prompt else tokens


def router_with_statistics(routed: RoutedModel, adapters: list[tuple[str, str]], **options: Any) -> RouterArtefact:
    """`artefact_for` with small rows, k = 1 and statistics of ORDINARY under the base model.

    With two trained rows and k = 2 nobody could come in without pushing a second choice out of the top k.
    """
    options["top_k"] = 1
    artefact = artefact_for(routed, adapters, **options)
    rows = {key: values * 0.3 for key, values in artefact.rows.items()}
    artefact = artefact_for(routed, adapters, **{**options, "rows": rows})
    states: dict[str, list[Tensor]] = {key: [] for key in rows}
    domains: list[int] = []
    for index, text in enumerate(ORDINARY):
        tokens = ByteRenderer().render_chat([{"role": "user", "content": text}])
        everything = torch.ones(len(tokens), dtype=torch.bool)
        snapshot = routed.bank.snapshot
        recorder = InputRecorder(None, snapshot, granularity="layer", keys=rows, positions=everything)
        model: Any = routed.model
        with torch.no_grad(), routed.context.running(recorder):
            model.base_model(input_ids=torch.tensor([tokens]), use_cache=False)
        for key, value in recorder.inputs.items():
            states[key].append(value)
        domains += [index % len(adapters)] * len(tokens)
    inputs = {key: torch.cat(parts) for key, parts in states.items()}
    kept = torch.arange(0, len(domains), 2)
    gates = {key: summarise_gate(inputs[key], kept, rows[key], artefact.temperature) for key in rows}
    background = to_tensors(Background(gates, torch.tensor(domains)[kept]))
    return artefact_for(routed, adapters, **{**options, "rows": rows, "background": background})


def ordinary_prompt_gate(num_choices: int = 2) -> PromptGate:
    """A prompt gate of two trained choices, of which the letter q speaks for the first, with statistics of ORDINARY."""
    scores = torch.zeros(305, num_choices, dtype=torch.float16)
    scores[ord("q"), 0] = 4.0
    questions = [(list(text.encode()), index % num_choices) for index, text in enumerate(ORDINARY)]
    return PromptGate(
        scores, ChatFrame((302,), 304), statistics=summarise_questions(questions, torch.eye(305), num_choices)
    )
