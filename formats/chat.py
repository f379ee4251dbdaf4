"""A checkpoint's tokenizer and chat template: text -> ids.

Three ideas: render (Template: what transformers would render), split (Chat: what in it is prompt, reply and
end), encode (tokens.Encoder: only the template's own text becomes control tokens; "</s>" in user text stays
text). Templates are the checkpoint's own; a base model, which brings none, gets PLAIN_TEMPLATE.
"""

import json
import os.path
import re
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path

import jinja2.ext
import jinja2.meta
import jinja2.sandbox  # jinja2 comes with torch

from engine.files import InputError, as_kind, fingerprint, need, parse_json, read_json, read_text
from formats import hub, tokens

TEMPLATE_DATE = datetime(2024, 7, 26)  # templates that print today's date would change caches overnight
PLAIN_TEMPLATE = (  # Alpaca's headings
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}")
SYSTEM, USER, REPLY = "TheSystem", "TheQuestion", "TheReply"  # what a template is probed with
OWN_VARIABLES = {"messages", "add_generation_prompt"}
TEMPLATE_ARGS = """one object is wanted, as in '{"enable_thinking": false}'"""
# a template is a program: these are what its own mistakes raise
TEMPLATE_MISTAKES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
                     RuntimeError, SyntaxError, TypeError, ValueError)


# ---- render ----

class Generation(jinja2.ext.Extension):
    """{% generation %} marks replies, for masks in transformers; here what is inside stands as it is."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def template_environment():
    """What templates find in transformers (utils/chat_template_utils.py), with a date that stands still."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DATE.strftime}
    return environment


class Template:
    """A compiled chat template. reads: the variables it looks up; literals: every text in its source."""

    def __init__(self, source, variables, where):
        self.where = where
        self.variables = {"tools": None, "documents": None} | variables
        environment = template_environment()
        try:
            tree = environment.parse(source)
            self.template = environment.from_string(source)
        except TEMPLATE_MISTAKES as error:
            raise self.refusal(f"does not compile ({one_line(error)})") from None
        self.reads = jinja2.meta.find_undeclared_variables(tree)
        texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literals = "\n".join(texts)
        self.takes_parts = not self.writes_question(parts=False) and self.writes_question(parts=True)

    def writes_question(self, parts):
        """Whether a question appears in what is rendered, given as text or as a list of parts."""
        self.takes_parts = parts
        try:
            text = self.render(question(USER), asking=True)
        except InputError:
            return False
        return re.search(rf"""(?<!['"]){USER}""", text) is not None      # and no list as code

    def refusal(self, what):
        return InputError(f"{self.where}: the chat template {what}: mend it, or put another into "
                          "chat_template.jinja")

    def render(self, messages, asking):
        """The text of messages; asking: with what stands before a reply."""
        if self.takes_parts:        # as those of models that see images
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]}
                        for message in messages]
        try:
            return self.template.render(messages=messages, add_generation_prompt=asking, **self.variables)
        except TEMPLATE_MISTAKES as error:
            raise self.refusal(f"fails ({one_line(error)})") from None


def question(prompt, system=""):
    """The messages of one."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- split ----

class Chat:
    """A chat template with its tokenizer: prompts and replies -> ids.

    A finished conversation is prompt, reply and end. The prompt is what stands before the reply: what every
    finished reply begins with (Qwen3's empty thoughts) belongs to it, what only an open one begins with (R1's
    "<think>") does not, so no log-prob covers either. White space before a reply belongs to the reply, as
    "▁Paris" is one token.
    """

    def __init__(self, template, tokenizer):
        self.template = template
        self.eos_id = tokenizer.eos_id
        self.bos_id = tokenizer.bos_id
        opening = template.render(question(USER), asking=True)
        self.prompt = self.prompt_text(question(USER))
        head, end = self.finished(question(USER), REPLY)
        if USER not in self.prompt:
            raise template.refusal("does not write the user's message before the reply")
        if REPLY in head:
            raise template.refusal("writes replies more than once")
        written = "\n".join([template.literals, opening, head, end])
        self.encoder = tokens.encoder_for(tokenizer.full, tokenizer.special, tokenizer.unk_id, written)
        control = self.encoder.control_tokens(self.encoder.encode(self.prompt), self.prompt)
        self.context = self.prompt[control[-1][1]:] if control else self.prompt
        self.frame = lru_cache(self._frame)
        self.check_system = lru_cache(self._check_system)
        self.stop_id = self.frame("", "")[2]
        self.notes = self._notes(opening, end)

    def _notes(self, opening, end):
        """What differs from the text the template itself would write, in words."""
        shared = len(os.path.commonprefix([opening, self.prompt]))
        unwritten = end.partition(self.encoder.names[self.stop_id])[0].strip()
        notes = [("what finished replies begin with, {!r}, is part of the prompt", self.prompt[shared:]),
                 ("what only an open reply begins with, {!r}, is left out", opening[shared:]),
                 ("what finished replies end with, {!r}, is left out", unwritten),
                 ("messages are given to it as lists of parts", self.template.takes_parts)]
        return [f"chat template: {note.format(text)}" for note, text in notes if text]

    def finished(self, messages, reply):
        """(text before REPLY, text after it) where messages are answered by a reply that holds REPLY."""
        text = self.template.render([*messages, {"role": "assistant", "content": reply}], asking=False)
        head, found, end = text.rpartition(REPLY)
        if not found:
            raise self.template.refusal("does not write replies as they are given "
                                        f"({reply!r} became {text[:60]!r})")
        return head, end

    def prompt_text(self, messages):
        opening = self.template.render(messages, asking=True)
        head, _ = self.finished(messages, REPLY)
        only_space = head.startswith(opening) and not head[len(opening):].strip()
        # Mistral writes the system prompt only before the last message, so no finished conversation has it.
        given = [message["content"] for message in messages]
        forgets = any(text in opening and text not in head for text in given)
        return opening if only_space or forgets else head.rstrip(" ")

    def _frame(self, before, after):
        """(text before, text after, stop id) of a reply between this white space, which a template may strip.

        It ends at the first control token after it; text before that, unless white space, is not written.
        """
        head, end = self.finished(question(USER), before + REPLY + after)
        start = head[len(self.prompt):] if head.startswith(self.prompt) else before
        text = self.context + start + REPLY + end
        reply_end = len(text) - len(end)
        for token, stop, _ in self.encoder.control_tokens(self.encoder.encode(text), text):
            if stop >= reply_end:
                between = text[reply_end:stop]
                return start, "" if between.strip() else between, token
        if self.eos_id is None:
            raise InputError(f"{self.template.where}: tokenizer_config.json names no eos_token of the "
                             "vocabulary, so no reply could end")
        return start, after if end.startswith(after) else "", self.eos_id

    def _check_system(self):
        """InputError that says why the template has no place for a system prompt."""
        try:
            text = self.prompt_text(question(USER, SYSTEM))
            if SYSTEM not in text or USER not in text:
                raise self.template.refusal("leaves out the system prompt")
        except InputError as error:
            raise InputError(f"{error}, or ask without a system prompt") from None

    def prompt_ids(self, prompt, system):
        (prompt, system), hidden = self.encoder.hide(prompt, system or "")
        if system:
            self.check_system()
        ids = self.encoder.ids(self.prompt_text(question(prompt, system)), hidden)
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise self.template.refusal("begins with BOS twice")
        if not ids:
            raise self.template.refusal("writes nothing before a reply, which then has no token to follow")
        return ids

    def response_ids(self, response):
        (response,), hidden = self.encoder.hide(response)
        core = response.strip()
        before, _, after = response.partition(core) if core else (response, "", "")
        start, end, stop = self.frame(before, after)
        ids = self.encoder.following(self.context, start + core + end,
                                     lambda text: self.encoder.ids(text, hidden))
        return [*ids, stop]


# ---- the checkpoint ----

class Tokenizer:
    """A checkpoint's tokenizer, and its chat template from the first prompt or reply on (`chat`).

    names: the special tokens ("eos_token": "</s>"). full: the tokenizer as the checkpoint's files give it.
    model: the directory of the model's config.json, if it is another one.
    """

    def __init__(self, directory, template_args=None, model=None):
        self.directory = Path(directory)
        self.model = Path(model or directory)
        self.template_args = template_args or {}
        self.config = tokens.read_tokenizer_config(self.directory)
        self.full, self.names, self.special = tokens.read_tokenizer(self.directory, self.config)
        self.bos_id, self.eos_id, self.unk_id = (
            self.full.token_to_id(self.names.get(key, "")) for key in ("bos_token", "eos_token", "unk_token"))
        self.encoder = tokens.Encoder(self.full, self.special, self.unk_id)
        self.misread = tokens.misread(self.full)
        self.vocab_size = 1 + max(self.full.get_vocab(with_added_tokens=True).values())
        # of the embedding: often more, never fewer
        rows = read_json(self.model / "config.json", missing={}).get("vocab_size")
        self.rows = rows if type(rows) is int else self.vocab_size
        self.config_stops = self._config_stops()

    def _config_stops(self):
        """Ids that config.json and generation_config.json say end a text, and the tokenizer's own."""
        stops = [self.eos_id]
        for path in (self.model / "config.json", self.model / "generation_config.json"):
            ids = read_json(path, missing={}).get("eos_token_id")
            stops += ids if isinstance(ids, list) else [ids]
            if not {*map(type, stops)} <= {int, type(None)}:
                raise InputError(f"{path}: eos_token_id is {ids!r}, whole numbers were expected")
        return {*stops} - {None}

    @cached_property
    def template(self):
        """The source of chat_template.jinja, else of tokenizer_config's chat_template, else the plain one."""
        file = self.directory / "chat_template.jinja"
        where = f"{self.directory}: chat_template"
        chat = read_text(file) if file.exists() else self.config.get("chat_template")
        if isinstance(chat, list):
            chat = {str(need(entry, "name", where)): need(entry, "template", where) for entry in chat}
        if isinstance(chat, dict):
            chat = need(chat, "default", f"{where}: put the one you want into chat_template.jinja")
            return as_kind(chat, str, where)
        if chat:
            return as_kind(chat, str, where)
        adds_bos = self.config.get("add_bos_token")
        adds_bos = self.bos_id in self.full.encode("").ids if adds_bos is None else adds_bos
        # a chat template decides on BOS itself, the plain one as the tokenizer
        return PLAIN_TEMPLATE if adds_bos else PLAIN_TEMPLATE.removeprefix("{{ bos_token }}")

    @cached_property
    def chat(self):
        """The template at work; InputError where it is broken."""
        template = Template(self.template, self.names | self.template_args, self.directory)
        unread = self.template_args.keys() - (template.reads - OWN_VARIABLES)
        if unread:
            known = ", ".join(sorted(template.reads - OWN_VARIABLES)) or "none"
            raise InputError(f"{self.directory}: the chat template reads no {', '.join(sorted(unread))}; "
                             f"variables that it reads: {known}")
        return Chat(template, self)

    @cached_property
    def stop_ids(self):
        """Every token that ends a reply. A broken template adds none: prompts say what is wrong with it."""
        try:
            return self.config_stops | {self.chat.stop_id}
        except InputError:
            return self.config_stops

    @cached_property
    def fingerprint(self):
        """Of everything that ids depend on."""
        try:
            template = self.template
        except InputError as error:
            template = str(error)
        variables = self.names, self.template_args
        return fingerprint(self.full.to_str(), template, variables, sorted(self.stop_ids))

    def _checked(self, ids):
        if ids and max(ids) >= self.rows:
            raise InputError(f"{self.directory}: tokenizer.json gives id {max(ids)}, "
                             f"config.json's vocab_size is {self.rows}: "
                             "tokenizer and weights do not belong together")
        return ids

    def text_ids(self, text):
        """Ids of bare text: no BOS, no template, no special token."""
        return self._checked(self.encoder.plain(text))

    def prompt_ids(self, prompt, system=None):
        """Ids of a user message in the template, ready for the reply. One BOS at the start, or InputError."""
        return self._checked(self.chat.prompt_ids(prompt, system))

    def response_ids(self, response):
        """Ids of a reply as they follow prompt_ids; the last one is the stop token."""
        return self._checked(self.chat.response_ids(response))

    def decode(self, ids, special=False):
        """Text of ids; special=True shows the special tokens too."""
        runs = groupby(ids, key=self.misread.get)
        return "".join(self.full.decode(list(run), skip_special_tokens=not special) if text is None
                       else text * len(list(run)) for text, run in runs)


def brings_tokenizer(directory):
    """Whether an adapter's directory holds a tokenizer and a chat template."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        return False
    configured = tokens.read_tokenizer_config(directory).get("chat_template")
    return bool(configured) or (directory / "chat_template.jinja").is_file()


def load_tokenizer(directory, template_args=None, model=None):
    """The tokenizer of a Hugging Face directory or hub id. Raises InputError.

    template_args: variables for its chat template, {"enable_thinking": False}, or that as JSON. model: the
    directory of the model that it is for, if it is another one: an adapter may bring a tokenizer.
    """
    if isinstance(template_args, str):
        template_args = as_kind(parse_json(template_args, "--template-args", TEMPLATE_ARGS), dict,
                                "--template-args")
    tokenizer = Tokenizer(hub.model_directory(directory, weights=()), template_args, model)
    if template_args:
        tokenizer.chat  # says at once which of them it does not read
    return tokenizer
