"""One record of a public data set -> its messages.

To add a format, add a line to READERS: its name, the keys that tell it, and a reader, which is
`reader(record, keys, counts) -> [(role, text)]` with the roles user, assistant, system, tool, and untrained
for a reply that is marked as not to be learned. A format of two plain columns needs no reader of its own:
`columns` takes the first key for the prompt's.

Null is empty. What cannot be read raises OddRecord, which costs that record alone; parts of messages that are
no text are counted.
"""

import contextlib
import itertools
import json
import os
import re
import unicodedata

ROLES = {name: role for role, names in {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt model bot chatbot ai bing bard claude llm",
    "system": "system developer",
    "tool": "tool tool_call tool_response function function_call function_response observation ipython",
}.items() for name in names.split()}
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
MARKS = ("weight", "train", "training", "loss")     # 0 or false: no reply to learn from (OpenAI, Axolotl)
MESSAGE_KEYS = (*ROLE_KEYS, *TEXT_KEYS, *MARKS, "tool_calls", "tool_call_id", "function_call")
SIDES = ("user", "assistant")
TURN_KEYS = (("input", "output"), ("human", "assistant"))     # of an object that holds a whole turn
CASES = ("inputs", "input", "question", "query", "problem")   # prompts that may be a case of a task
TASKS = ("definition", "instruction")
ABOUT = ("input", "context", "passage", "document", "article")       # what a prompt speaks about
NO_INPUT = ("<noinput>", "noinput", "no input")             # how Self-Instruct and Alpaca say so
SYSTEM = ("system", "system_prompt")
BESIDE = (*ABOUT, *SYSTEM, "history")
CHOICES = ("choices", "options", "option_a", "A")           # what a question chooses from
A_CHOICE = r"(op|opt|option|choice|answer|alternative|ending|candidate)?s?[ _]?[a-e0-5]?"   # names of columns
A_LETTER = r"\W*[a-e0-5]\W*"                                # a reply that names one
LABELLED = ("completion", "messages", "conversations")    # where "label" tells good from bad replies
LABELS = ("kto_tag", "is_safe", "is_correct")             # and these everywhere
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
UNKNOWN = "unknown format"
# Letters and symbols that print nothing: fillers of Hangul syllables, the empty Braille pattern.
BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800"
BLANK_CATEGORIES = ("Z", "M", "Cc", "Cf")        # spaces, marks on no letter, controls, formats


class Skip(Exception):
    """Why a sound record gives no row. Its place is not in the reason: reasons are counted."""


class OddRecord(Skip):
    """Why a record cannot be read: its neighbours can."""


# ---- values ----

def is_blank(text):
    """Nothing in the text can be seen: it is empty, or spaces, zero-width, control, combining characters."""
    return all(unicodedata.category(character).startswith(BLANK_CATEGORIES) or character in BLANK_LETTERS
               for character in text)


def as_text(value, key, counts):
    """The text under a key. Null is empty, numbers and truth values stand as in the file, parts of a
    list are joined; parts without text (images) are counted. OddRecord for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if not isinstance(value, list):
        raise OddRecord(f'"{key}" holds an object where text is wanted')
    if sum(part is not None and not isinstance(part, dict) for part in value) > 1:
        raise OddRecord(f'"{key}" holds {len(value)} values where one text is wanted')
    return "".join(part_text(part, key, counts) for part in value)


def part_text(part, key, counts):
    """The text of one part of a message; an image has none."""
    if isinstance(part, dict) and "text" not in part:
        counts["parts without text left out (images, calls)"] += 1
        return ""
    return as_text(part["text"] if isinstance(part, dict) else part, key, counts)


def as_list(value, key):
    """A list, or one written as JSON, as tables hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise OddRecord(f'"{key}" holds no list')
    return value


def is_false(value):
    """False, 0, or as a table writes it."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def is_true(value):
    """Neither empty nor false, as a table writes it."""
    return bool(value) and not is_false(value)


def named(keys):
    """Keys or other words out of a file, safe to print in one line."""
    return ", ".join(f"{key!r:.40}" for key in list(keys)[:12])


# ---- records -> messages ----

def first_key(message, keys):
    """The first of the keys that holds something, else the first that is there, else None."""
    held = [key for key in keys if key in message]
    return max(held, key=lambda key: message[key] is not None, default=None)


def message_of(message, counts):
    """(role, text) of {"role", "content"} or {"from", "value"}, in any spelling of the role."""
    if not isinstance(message, dict):
        raise OddRecord("a message that is no object")
    role_key, key = first_key(message, ROLE_KEYS), first_key(message, TEXT_KEYS)
    name = message.get(role_key)
    if name is None:
        raise OddRecord(f'a message without "role" or "from" (keys: {named(message)})')
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise OddRecord(f'a message whose "{role_key}" is {name!r:.40}, an unknown role')
    if role == "tool" or message.get("tool_calls") or message.get("function_call"):
        return "tool", ""
    if role == "assistant" and any(is_false(message.get(mark)) for mark in MARKS):
        return "untrained", ""
    if key is None:
        raise OddRecord(f'a message of role {name!r:.40} without "content" (keys: {named(message)})')
    return role, as_text(message[key], key, counts)


def messages_of(value, role, key, counts):
    """[(role, text)] of what a key holds: the text of one message, or a list of messages."""
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if has_role(value):
        value = [value]
    if isinstance(value, list) and any(map(has_role, value)):
        return [message_of(message, counts) for message in value]
    text = as_text(value, key, counts)
    return dialogue(text) or [(role, text)]


def has_role(item):
    """A message has a role, a part of one message has none."""
    return isinstance(item, dict) and any(key in item for key in ROLE_KEYS)


def dialogue(text):
    """[(role, text)] of a conversation written out as Anthropic's hh-rlhf does, or with single line ends up
    to an open "Assistant:", as BELLE does; else []."""
    if re.match(r"\s*Human:.*\n\nAssistant:", text, re.DOTALL):
        gap = r"\n\n"
    elif re.match(r"\s*Human:.*\nAssistant:\s*$", text, re.DOTALL):
        gap = r"\n"
    else:
        return []
    _, *turns = re.split(rf"(?:^\s*|{gap})(Human|Assistant):", text)
    messages = [(ROLES[name.lower()], text.strip()) for name, text in zip(turns[::2], turns[1::2])]
    return messages if messages[-1][1] else messages[:-1]         # a prompt ends with an open "Assistant:"


def listed(record, keys, counts):
    """Messages of a list; of a list of texts, which take turns; of turns of an input and an output."""
    messages, key = [], keys[0]
    for number, item in enumerate(as_list(record[key], key)):
        turn = [keys for keys in TURN_KEYS if isinstance(item, dict) and {*keys} <= item.keys()]
        if isinstance(item, str):
            messages.append(("assistant" if number % 2 else "user", item))
        elif turn and not has_role(item):
            messages += zip(SIDES, (as_text(item[key], key, counts) for key in turn[0]))
        else:
            messages.append(message_of(item, counts))
    return messages


def columns(record, keys, counts):
    """Messages of a record with a column for the prompt and one for the response, and perhaps others for a
    system prompt, earlier turns, the task that the prompt is a case of, and what it speaks about."""
    asked, answered = keys
    refuse_choices(record, keys)
    prompt = messages_of(record[asked], "user", asked, counts)
    reply = messages_of(record[answered], "assistant", answered, counts)
    if any(role == "user" for role, _ in reply):
        return reply                                  # UltraFeedback: `chosen` begins with the prompt
    *before, (role, text) = prompt
    ahead = TASKS if asked in CASES else ()
    behind = [key for key in ABOUT if key != asked]
    texts = [as_text(record.get(key), key, counts) for key in (*ahead, *behind)]
    texts.insert(len(ahead), text)
    texts = [text for text in texts if not is_blank(text) and text.strip().lower() not in NO_INPUT]
    question = role, "\n".join(texts)
    system = [("system", as_text(record[key], key, counts)) for key in SYSTEM if record.get(key)]
    return [*system, *earlier_turns(record, counts), *before, question, *reply]


def refuse_choices(record, keys):
    """OddRecord for a question with choices to choose from, and for a reply that is only the name, or the
    number, of another column."""
    asked, answered = keys
    reply, others = record[answered], record.keys() - {*keys, *BESIDE}
    choices = [key for key in others if record[key] and re.fullmatch(A_CHOICE, key, re.IGNORECASE)]
    is_letter = re.fullmatch(A_LETTER, str(reply), re.IGNORECASE)
    if any(map(record.get, CHOICES)) or choices and is_letter:
        raise OddRecord("a multiple-choice question, which is for a benchmark")
    if isinstance(reply, str) and reply in others or answered == "chosen" and isinstance(reply, int):
        raise OddRecord(f'"{answered}" only names the reply')


def earlier_turns(record, counts):
    """Messages of the `history` that Alpaca files may have: [[prompt, response], ...]."""
    messages = []
    for turn in as_list(record.get("history") or [], "history"):
        texts = [as_text(text, "history", counts) for text in as_list(turn, "history")]
        messages += zip(SIDES, texts)
    return messages


def implicit_prompt(record, keys, counts):
    """Messages of a preference pair without a prompt: both texts begin with it (TRL, "Dataset formats").
    Where they part inside a word, the response begins with that word."""
    chosen, rejected = (messages_of(record[key], "assistant", key, counts) for key in keys)
    if len(chosen) != 1 or chosen[0][0] != "assistant":
        return chosen
    texts = chosen[0][1], rejected[0][1] if rejected else ""
    shared = os.path.commonprefix(texts)
    prompt = re.sub(r"\s\S*\Z", "", shared)
    if is_blank(prompt) or shared in texts:
        raise OddRecord("chosen and rejected do not begin with one prompt")
    return [("user", prompt.strip()), ("assistant", texts[0][len(prompt):].strip())]


# Name, keys that tell the format, reader. The first line whose keys a record has is taken; without one, the
# first column of PROMPTS and the first of REPLIES that it has.
READERS = (
    ("preferences", ("messages", "chosen"), columns),           # Axolotl
    ("preferences", ("conversations", "chosen"), columns),      # LLaMA-Factory
    ("preferences", ("input", "preferred_output"), columns),    # OpenAI
    ("messages", ("messages",), listed),
    ("ShareGPT", ("conversations",), listed),
    ("ShareGPT", ("conversation",), listed),
    ("Alpaca", ("instruction", "output"), columns),
    ("Dolly", ("instruction", "response"), columns),
    ("preferences", ("prompt", "chosen"), columns),
    ("preferences", ("question", "chosen"), columns),
    ("preferences", ("instruction", "chosen"), columns),
    ("preferences", ("input", "chosen"), columns),
    ("preferences", ("chosen", "rejected"), implicit_prompt),
    ("prompt and response", ("prompt", "response"), columns),
    ("prompt and completion", ("prompt", "completion"), columns),
    ("Aya, FLAN", ("inputs", "targets"), columns),
    ("OpenOrca", ("question", "response"), columns),
    ("question and answer", ("question", "answer"), columns),
    ("user and assistant", ("user", "assistant"), columns),
    ("human and assistant", ("human", "assistant"), columns),
    ("UltraChat", ("data",), listed),
)
PROMPTS = ("instruction", "question", "prompt", "query", "problem", "inputs", "input")
REPLIES = ("response", "completion", "output", "solution", "answer", "targets", "target")
FORMATS = ", ".join(['parallel ({"en": {"prompt", "response"}, ...})', "OpenAssistant (trees or messages)",
                     *dict.fromkeys(f"{name} ({', '.join(keys)})" for name, keys, _ in READERS),
                     f"a prompt ({', '.join(PROMPTS)}) and its reply ({', '.join(REPLIES)})"])


def find_format(record):
    """(keys, reader) of the record's format, or None. Keys that hold null count where no others tell it:
    files joined from several have the columns of all."""
    filled = {key for key, value in record.items() if value not in (None, [])}
    for held in (filled, record.keys()):
        for _, keys, reader in READERS:
            if {*keys} <= held:
                return keys, reader
        asked, answered = [key for key in PROMPTS if key in held], [key for key in REPLIES if key in held]
        if asked and answered:
            return (asked[0], answered[0]), columns
    return None


def unread(record):
    """The columns of a record of a known format, and the keys of its messages (a reply's "thinking"), that
    hold something and that its reader does not look at. A reader of one's own is taken to look at what
    `columns` does."""
    keys, reader = find_format(record)
    read = {*keys, "rejected", *labels_of(keys)}
    if reader not in (listed, implicit_prompt):
        read |= {*BESIDE, *(TASKS if keys[0] in CASES else ())}
    found = [key for key in held_keys(record) if key not in read]
    lists = [value for value in map(record.get, keys) if isinstance(value, list)]
    for message in filter(has_role, itertools.chain.from_iterable(lists)):
        found += [key for key in held_keys(message) if key not in MESSAGE_KEYS]
    return found


def held_keys(record):
    """The keys of a record that hold something."""
    return [key for key, value in record.items() if value not in (None, "", [], {})]


def labels_of(keys):
    """The columns of a format that may call the reply a bad one."""
    return (*LABELS, "label") if keys[-1] in LABELLED else LABELS


def read_conversation(record, counts):
    """[(role, text)] of a record. OddRecord."""
    if found := find_format(record):
        keys, reader = found
        if any(is_false(record.get(label)) for label in labels_of(keys)):
            raise Skip("a completion labelled as a bad one")
        if any(map(record.get, MEDIA)):
            raise Skip("about pictures or sound, which no text shows")
        return reader(record, keys, counts)
    raise OddRecord(f"{UNKNOWN} (keys: {named(record)})")
