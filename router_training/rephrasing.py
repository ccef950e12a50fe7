"""Questions framed anew: greetings, reasons, closing words, marks around them, system messages, the order of two lines.

The data of a task often comes in a handful of templates, and a router learns those as readily as the task. Framing
changes what stands around the question and leaves the question itself, its answer and its label alone. Frames are of
no task, and chats of all tasks and of the base model get the same ones, so that they say nothing about any.
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
GREETINGS = ("", "Hi there! ", "Good evening. ", "hey ", "Dear assistant, ", "Hello again, ", "hi, ", "Morning! ")
REASONS = (
    "I'm writing a small program in my free time and this is the part I don't get. ",
    "I have an exam next week and want to be sure. ",
    "My boss wants this before lunch and I've never done it. ",
    "My sister sent me this and neither of us knows. ",
    "English is not my first language, sorry for mistakes. ",
    "I have a long list of these to get through for work. ",
    "I tried it on my own and gave up. ",
    "We couldn't agree about it at the office, so I'm asking you. ",
    "It's for a course I'm taking in the evenings. ",
    "I found this in an old notebook and it has been on my mind since. ",
    "I'm putting together material for my students. ",
    "This came in from one of our customers this morning. ",
    "I need it for a table that I'm filling in. ",
    "we are testing some tools here and you are one of them. ",
)
REQUESTS = (
    "Could you help me out?",
    "Would you have a look, please?",
    "What would you answer here?",
    "Please tell me what you make of it.",
    "can u do it",
    "I'd be glad if you could deal with this:",
    "It goes like this:",
    "Please I want you do this one for me.",
    "Here it is.",
)
ROLES = (
    "You are one part of a larger system. You get an input and write the output, nothing else.",
    "You are a careful worker who does what the text below asks for.",
    "Act as a specialist for what follows.",
    "You will be given one item. Do with it what it says and return the result.",
    "### Instructions\nRead the input and write the output that belongs to it.\n\n### Input",
)
JOINTS = ("\n\n", "\n", " ")
WRAPPERS = (
    "```\n{}\n```",
    "<request>\n{}\n</request>",
    "<input>{}</input>",
    "INPUT: {}\nOUTPUT:",
    "### Task\n{}\n\n### Response",
    "- {} ->",
    "[1] {}",
    "request = '{}'",
    "> {}",
    "(( {} ))",
    "***\n{}\n***",
    '"{}"',
)
CLOSINGS = (
    "\nThanks!",
    " Thank you.",
    "\n\nPlease answer.",
    "\nWhat do you say?",
    "\nGive only the answer.",
    "\nTake your time.",
    "\n\nI'd be very grateful for your help, have a nice day!",
    "\n\nThat would really save my afternoon.",
    " pls be quick",
    "\nNo need to say anything else.",
    "\n\nJust give me what I asked for and we are done here.",
    "\n\nI'd like to understand it too, not just copy it. Many thanks.",
    "\n\nOutput:",
    "\n# your answer here",
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
    if generator.random() < 0.25:
        content = generator.choice(WRAPPERS).format(content)
    if generator.random() < 0.6:
        content = opening(generator) + content
    if generator.random() < 0.5:
        content += generator.choice(CLOSINGS)
    messages: list[Mapping[str, str]] = [*history, {**question, "content": content}, answer]
    if messages[0]["role"] != "system" and generator.random() < 0.5:
        messages.insert(0, {"role": "system", "content": generator.choice(SYSTEM_MESSAGES)})
    return replace(chat, messages=tuple(messages))


def without_framing(chat: Chat) -> Chat:
    """The chat less a system message that only `rephrase` writes."""
    first = chat.messages[0]
    is_ours = first["role"] == "system" and first["content"] in SYSTEM_MESSAGES
    return replace(chat, messages=chat.messages[1:]) if is_ours else chat


def opening(generator: random.Random) -> str:
    """What somebody may say before they ask: a few words, a story, or who the answer is to come from."""
    kind = generator.random()
    if kind < 0.3:
        return generator.choice(OPENINGS)
    if kind < 0.5:
        return generator.choice(ROLES) + generator.choice(JOINTS)
    reason = generator.choice(REASONS) if kind < 0.9 else ""
    return generator.choice(GREETINGS) + reason + generator.choice(REQUESTS) + generator.choice(JOINTS)
