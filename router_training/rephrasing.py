"""Questions framed anew: greetings, closing words, system messages, the order of two lines.

The data of a task often comes in a handful of templates, and a router learns those as readily as the task. Framing
changes what stands around the question and leaves the question itself, its answer and its label alone.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from router_training.data import Chat

OPENINGS = (
    "Hi! ",
    "Hello,\n\n",
    "Hey, quick one: ",
    "Please help me with this.\n",
    "I have a question.\n\n",
    "Can you do this for me? ",
    "Next one.\n",
    "Here is my request:\n",
)
CLOSINGS = (
    "\nThanks!",
    " Thank you.",
    "\n\nPlease answer.",
    "\nWhat do you say?",
    "\nGive only the answer.",
    "\nTake your time.",
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer the user's question.",
    "You are an expert. Be brief and precise.",
    "Follow the instructions carefully.",
    "You answer questions of all kinds for the users of our website.",
)


def rephrase_some(chats: Sequence[Chat], fraction: float, seed: int) -> list[Chat]:
    """The chats in order, `fraction` of them (rounded) framed anew; which ones and how follows from `seed`."""
    generator = random.Random(f"rephrase {seed}")
    chosen = set(generator.sample(range(len(chats)), round(len(chats) * fraction)))
    return [rephrase(chat, generator) if index in chosen else chat for index, chat in enumerate(chats)]


def rephrase(chat: Chat, generator: random.Random) -> Chat:
    """One chat with its last question framed anew and, half of the time, a system message if it has none."""
    *history, question, answer = chat.messages
    content = question["content"]
    lines = content.split("\n")
    if len(lines) == 2 and generator.random() < 0.5:  # more lines may be a list whose order means something
        content = f"{lines[1]}\n{lines[0]}"
    if generator.random() < 0.5:
        content = generator.choice(OPENINGS) + content
    if generator.random() < 0.5:
        content += generator.choice(CLOSINGS)
    messages: list[Mapping[str, str]] = [*history, {**question, "content": content}, answer]
    if messages[0]["role"] != "system" and generator.random() < 0.5:
        messages.insert(0, {"role": "system", "content": generator.choice(SYSTEM_MESSAGES)})
    return replace(chat, messages=tuple(messages))
