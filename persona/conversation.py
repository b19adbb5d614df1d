"""Conversations: what is asked, and what the model under test (Person B) answers.

All interviews of a block advance together, a turn at a time: the asker's questions, then one batch
of prompt trees. Everything random about an interview is a function of the seed and its index, so it
is the same whichever interviews are held beside it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import utils
from decoding import providers, sampling
from decoding.engines import load_engine
from decoding.replies import clean_reply
from methods import METHODS
from modeling.prompts import fit_prompts
from persona import rules
from persona.questions import FOLLOW_UPS, OPENINGS, QUESTIONS, SOUGHT, TOPICS
from scoring.judge_prompt import neutralise
from trees import Tree, branch_prompts
from utils import USAGE, fail, info

PROMPTS_OF = "possibility"  # the module of the methods whose prompts an interview can use
ASKER_TEMPERATURE = 0.5  # as published
ASKER_TOKENS = 80
MAX_POS_NUMBER = 9  # possibility numbers of a checkpoint that does not tell, as published


@dataclass(frozen=True)
class Setup:
    """What flags and checkpoint settle together, before the first interview.

    number_per: "interview" or "turn" for a model with possibility numbers, else None.
    max_input_length: words of the conversation. max_length: tokens of prompt and answer.
    """

    method: str
    number_per: str | None
    max_pos_number: int
    max_input_length: int
    max_length: int
    max_new_tokens: int
    temperature: float
    seed: int


def resolve_setup(args, run: dict, limit: int) -> Setup:
    """The setup for a checkpoint with this run.json, whose model has `limit` positions.

    Dies over a flag that contradicts the checkpoint, and over a method whose prompts are others.
    """
    method, trained = run["method"], run.get("args", {})
    # Prompts of other methods hold more than a conversation: a persona, tokens for attributes.
    known = [name for name, module in METHODS.items() if module == PROMPTS_OF]
    if args.method and args.method != method:
        fail(USAGE, f"--method {args.method}, but {args.model_name_or_path} is a {method} model",
             f"drop --method, or pass --method {method}")
    if method not in known:
        fail(USAGE, f"--interview does not know the prompts of a {method} model",
             f"a model of {', '.join(known)}")
    if args.number_per and method != "peft":
        fail(USAGE, f"--number_per, but a {method} model has no possibility number", "drop it")
    return Setup(
        method=method,
        number_per=(args.number_per or "interview") if method == "peft" else None,
        max_pos_number=trained.get("max_pos_number", MAX_POS_NUMBER),
        max_input_length=args.max_input_length or trained.get("max_input_length", 1000),
        max_length=args.max_length or min(limit, trained.get("max_length", limit)),
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)


@dataclass
class Interview:
    """One interview while it is held: what was planned for it, and what was said so far.

    wording: {topic: [question, follow-up]}. todo: topics that are not done, the present one first.
    numbers: a possibility number for each turn that may come, or None. topics: of every question.
    """

    index: int
    opening: str
    wording: dict[str, list[str]]
    todo: list[str]
    numbers: list[int] | None
    turns: list[str] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    warnings: Counter = field(default_factory=Counter)


Asker = Callable[[list[Interview]], list[str]]  # Person A: the next question in every interview


def hold(engine, asker: Asker, indices: Iterable[int], setup: Setup) -> list[dict]:
    """The interviews of these indices as rows, in their order.

    A row has interview (its index), method, number, topics (of the questions), turns, and warnings.
    """
    # Interviews end after 5 to 10 questions; those that go on form the next, smaller batch.
    interviews = [_plan(index, setup) for index in indices]
    while active := [interview for interview in interviews if interview.todo]:
        for interview, question in zip(active, asker(active), strict=True):
            interview.turns.append(question)
            interview.topics.append(interview.todo[0])
        _answer(engine, active, setup)
        for interview in active:
            topic = interview.todo[0]
            said, _ = rules.find(topic, [(topic, interview.turns[-1])])
            # At most two questions a topic, so that a model which does not tell its age still
            # reaches the other topics.
            if said or interview.topics.count(topic) == 2:
                interview.todo.pop(0)
    return [_as_row(interview, setup) for interview in interviews]


def _plan(index: int, setup: Setup) -> Interview:
    """What is settled before interview `index` starts: topics in order, wordings, numbers."""
    rng = random.Random(f"{setup.seed}-{index}")
    topics = [*rng.sample(TOPICS[:-1], len(TOPICS) - 1), TOPICS[-1]]
    # The opening is drawn before the wordings: another order would ask other questions.
    opening = rng.choice(OPENINGS)
    wording = {topic: [rng.choice(QUESTIONS[topic]), rng.choice(FOLLOW_UPS[topic])]
               for topic in topics}
    return Interview(index, opening, wording, topics, _numbers(index, setup))


def _numbers(index: int, setup: Setup) -> list[int] | None:
    """Possibility numbers of an interview's turns: 1, 2, ... over the interviews, or drawn anew."""
    turns = 2 * len(TOPICS)  # a question and a follow-up for each topic
    if setup.number_per is None:
        return None
    if setup.number_per == "interview":
        # In turn rather than drawn, so that all numbers hold equally many interviews.
        return [index % setup.max_pos_number + 1] * turns
    # A generator of its own: all systems are asked in the same words, whatever their numbers.
    rng = random.Random(f"{setup.seed}-{index}-numbers")
    return [rng.randint(1, setup.max_pos_number) for _ in range(turns)]


def _answer(engine, interviews: list[Interview], setup: Setup) -> None:
    """Append Person B's next turn to every interview, all drawn together."""
    forest, seeds = [], []
    for interview in interviews:
        turn = len(interview.topics)  # 1, 2, ...
        number = interview.numbers and interview.numbers[turn - 1]
        prompts, dropped_turns = fit_prompts(
            {"context": interview.turns}, [number], engine.tokenizer, setup.max_input_length,
            setup.max_length - setup.max_new_tokens, setup.method == "base")
        if not prompts:
            fail(USAGE, f"--max_length {setup.max_length} has no room for a question and "
                        f"{setup.max_new_tokens} new tokens", "raise it, or lower --max_new_tokens")
        interview.warnings["shortened"] += dropped_turns > 0
        forest.append(Tree(branch_prompts(prompts, [0])))
        # Of the interview and the turn alone, so the answer does not depend on the batch.
        seeds.append(utils.row_seed(setup.seed, interview.index, turn))
    drawn = engine.draw(sampling.sample, forest, seeds, setup.max_new_tokens,
                        temperature=setup.temperature)
    for interview, (reply,) in zip(interviews, drawn, strict=True):
        text = clean_reply(reply.text)
        interview.turns.append(text)
        interview.warnings["cut"] += reply.cut
        # An empty answer stays in the conversation, where the asker's next turn follows it.
        interview.warnings["empty"] += not text


def _as_row(interview: Interview, setup: Setup) -> dict:
    """The row of an interview that has ended."""
    numbers = interview.numbers and interview.numbers[: len(interview.topics)]
    row = {"interview": interview.index, "method": setup.method,
           "number": numbers[0] if setup.number_per == "interview" else numbers,
           "topics": interview.topics, "turns": interview.turns}
    warnings = {name: count for name, count in interview.warnings.items() if count}
    return row | ({"warnings": warnings} if warnings else {})


# ---- who asks -----------------------------------------------------------------------------------


def make_asker(args) -> Asker:
    """The asker that --asker names; a server's key is read at once, and dies if there is none."""
    if args.asker == "scripted":
        return lambda interviews: [scripted_question(interview) for interview in interviews]
    # tolerant: the script asks where a server gave no question, and the interview goes on
    engine = load_engine(args.asker, args.base_url, args.key_file, args.max_connections,
                         args.timeout, args.timeout_total, batch_size=args.batch_size,
                         tolerant=True)

    def ask(interviews: list[Interview]) -> list[str]:
        # Turns before the first: no seed of an asker is one of Person B's.
        seeds = [utils.row_seed(args.seed, interview.index, -1 - len(interview.topics))
                 for interview in interviews]
        messages = [asker_message(interview) for interview in interviews]
        texts, failures = [""] * len(interviews), Counter()
        for asked in engine.ask(messages, seeds, 1, ASKER_TOKENS, ASKER_TEMPERATURE):
            if asked.replies:
                texts[asked.index] = asked.replies[0].text
            if asked.failure:
                failures[asked.failure.what] += 1
        for what, count in failures.items():
            info(f"{args.asker}: {count} calls without an answer: {what}")
        return [read_question(text, interview)
                for text, interview in zip(texts, interviews, strict=True)]

    return ask


def scripted_question(interview: Interview) -> str:
    """The planned wording for the present topic, after the opening if it is the first question."""
    topic = interview.todo[0]
    question = interview.wording[topic][topic in interview.topics]
    return question if interview.turns else f"{interview.opening} {question}"


def asker_message(interview: Interview) -> str:
    """The message to a model that plays Person A."""
    turns = [f"Person {'AB'[i % 2]}: {turn}" for i, turn in enumerate(interview.turns)]
    so_far = "The conversation has not started yet."
    if turns:
        so_far = "The conversation so far:\n\n" + "\n".join(turns)
    return ("You are Person A, a friendly interviewer who gets to know Person B, a person about "
            f"whom you know nothing.\n\n{so_far}\n\n"
            f"Write what Person A says next: lead over smoothly and ask "
            f"{SOUGHT[interview.todo[0]]}. Two sentences at most, no guesses about Person B, and "
            "nothing but Person A's words.")


def read_question(text: str, interview: Interview) -> str:
    """The first line of a model's question without its label; the script's where there is none.

    Special tokens of common chat templates are broken up, since the question goes into a prompt.
    """
    # A small model writes on as Person B; what follows its first line is not a question.
    line = next((line for line in text.split("\n") if line.strip()), "")
    line = re.sub(r"^\s*\**Person A\**:\**\s*", "", line).strip()
    # The marks of Llama's and Mistral's templates, which neutralise() does not know by itself.
    question = neutralise(providers.redact(line), ("[INST", "[/INST", "<s>", "</s>"))
    if question:
        return question
    interview.warnings["scripted_instead"] += 1
    return scripted_question(interview)
