"""A record of each well-known shape of dialogue data, with made-up words."""

from __future__ import annotations

import json
from typing import Any

S, U, A, T = "system", "user", "assistant", "tool"
Q, R = "Is it open?", "Until six."
QA = [(U, Q), (A, R)]


def spoken(speaker: str, text: str, *turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Utterances with these names of the speaker's field and of the text's."""
    return [{speaker: name, text: content} for name, content in turns]


def chat(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Messages of OpenAI's format."""
    return spoken("role", "content", *turns)


def moss_turn(
    human: str, moss: str, thoughts: str = "None", commands: str = "None", results: str = "None"
) -> dict[str, str]:
    """A turn of MOSS with its five channels."""
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": f"<|Results|>:\n{results}\n<eor>\n",
        "MOSS": f"<|MOSS|>: {moss}<eom>\n",
    }


HUMAN = [("human", Q), ("gpt", R)]
MORE = [*QA, (U, "And then?"), (A, "No.")]
EXPORT = {
    "title": "t",
    "id": "x",
    "current_node": "e",
    "mapping": {
        "a": {"id": "a", "message": None, "parent": None, "children": ["c"]},
        "c": {
            "parent": "a",
            "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": [Q]}},
        },
        "d": {
            "parent": "c",
            "message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": [""]}},
        },
        "e": {
            "parent": "c",
            "message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": [R]}},
        },
    },
}
CLAUDE = [
    {"uuid": "1", "sender": "human", "text": Q, "content": [{"type": "text", "text": Q}], "attachments": []},
    {"uuid": "2", "sender": "assistant", "text": R, "content": []},
]
GEMINI_CHAT = [{"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [{"text": R}]}]
BRIEF = [(S, "Be brief."), *QA]
LLAMA = f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{Q} [/INST] {R} </s><s>[INST] And then? [/INST] No. </s>"
HEADERS = "".join(f"<|start_header_id|>{name}<|end_header_id|>\n\n{text}<|eot_id|>" for name, text in QA)
BATTLE = {"model_a": "x", "model_b": "y", "conversation_a": chat((U, Q), (A, "No.")), "conversation_b": chat(*QA)}
FLAT = {"turn_id": ["0", "1"], "speaker": [0, 1], "utterance": [Q, R], "frames": [{}, {}]}
WIZARD = spoken("speaker", "text", ("0_Wizard", R), ("1_Apprentice", Q))
FLAGGED = [{"message": R, "is_human": False}, {"message": Q, "is_human": True}]
PALM = spoken("author", "content", ("user", Q), ("bot", R))
#: Format, record, its one conversation under `--preference chosen`, and the other formats that the record matches.
SHAPES: list[tuple[str, Any, list[tuple[str, Any]], tuple[str, ...]]] = [
    # LMSYS-Chat-1M, WildChat
    ("messages", {"conversation_id": "c", "conversation": chat(*QA), "turn": 1, "redacted": False}, QA, ()),
    ("messages", {"conversation": [{**one, "toxic": False, "language": "English"} for one in chat(*QA)]}, QA, ()),
    # ShareGPT's kin
    ("messages", {"id": "1", "conversations": chat(*QA)}, QA, ()),
    ("messages", {"messages": json.dumps(chat(*QA))}, QA, ()),
    ("messages", {"prompt": Q, "prompt_id": "p", "messages": chat(*QA)}, QA, ()),
    ("sharegpt", {"id": "1", "items": spoken("from", "value", *HUMAN)}, QA, ()),
    ("sharegpt", {"items": [{"from": "human", "text": Q}, {"from": "chatgpt", "markdown": R, "text": None}]}, QA, ()),
    ("sharegpt", {"conversations": spoken("from", "value", *HUMAN), "system_prompt": "Be brief."}, BRIEF, ()),
    ("sharegpt", {"conversations": spoken("from", "value", (S, "Be brief."), *HUMAN), "system": "Be brief."}, BRIEF,
     ()),
    # UltraChat, LIMA, LCCC, NaturalConv, SODA, MetaLWOz
    ("lists", {"id": "0", "data": [Q, R, "And then?", "No."]}, MORE, ()),
    ("lists", {"conversations": [Q, R], "source": "x"}, QA, ()),
    ("lists", {"dialog_id": "0_1", "document_id": 0, "content": [Q, R]}, QA, ()),
    ("lists", {"dialogue": [Q, R, "Hm"], "speakers": ["Ann", "Bo", "Bo"]}, [*QA, (A, "Hm")], ()),
    ("lists", {"id": "i", "user_id": "u", "bot_id": "b", "turns": [R, Q]}, QA[::-1], ()),
    # Capybara, COIG, RiSAWOZ, DialogStudio, XTuner
    ("pairs", {"source": "x", "conversation": [{"input": Q, "output": R}]}, QA, ()),
    ("pairs", {"dialogue_id": "1", "dialogue": [{"user_utterance": Q, "system_utterance": R, "turn_id": 0}]}, QA, ()),
    ("pairs", {"log": [{"user utterance": Q, "system response": R}]}, QA, ()),
    ("pairs", {"conversation": [{"system": "Be brief.", "input": Q, "output": R}]}, BRIEF, ()),
    ("pairs", {"turns": [{"user": Q, "bot": R}]}, QA, ()),
    # Dolly, OpenOrca, CAMEL, Firefly, question and answer sets, xLAM
    ("prompt_completion", {"instruction": Q, "context": "", "response": R, "category": "x"}, QA, ()),
    ("prompt_completion", {"id": "1", "system_prompt": "Be brief.", "question": Q, "response": R}, BRIEF, ()),
    ("prompt_completion", {"role_1": "x", "message_1": Q, "message_2": R}, QA, ()),
    ("prompt_completion", {"kind": "x", "input": Q, "target": R}, QA, ()),
    ("prompt_completion", {"Patient": Q, "Doctor": R}, QA, ()),
    ("prompt_completion", {"problem": Q, "solution": R}, QA, ()),
    ("prompt_completion", {"instruction": Q, "completion": R}, QA, ()),
    ("prompt_completion", {"query": Q, "answers": '[{"name": "f"}]', "tools": "[]"}, [(U, Q), (A, None)], ()),
    # Chatbot Arena, OpenAI, Swift, UltraFeedback
    ("preference", {**BATTLE, "winner": "model_b"}, QA, ()),
    ("preference", {"input": {"messages": chat((U, Q)), "tools": []}, "preferred_output": chat((A, R)),
                    "non_preferred_output": chat((A, "No."))}, QA, ()),
    ("preference", {"query": Q, "response": R, "rejected_response": "No."}, QA, ("prompt_completion",)),
    # Wizard of Wikipedia, MultiWOZ on the hub, PIPPA, PaLM, ABCD, [role, text]
    ("utterances", {"dialog": WIZARD}, QA[::-1], ()),
    ("utterances", {"dialogue_id": "1", "turns": FLAT}, QA, ()),
    ("utterances", {"conversation": FLAGGED}, QA[::-1], ()),
    ("utterances", {"context": "Be brief.", "messages": PALM}, BRIEF, ()),
    ("utterances", {"original": [["customer", Q], ["action", "Looked up."], ["agent", R]]}, QA, ()),
    ("utterances", {"conversation": [["user", Q], ["assistant", R]]}, QA, ()),
    ("utterances", [["user", Q], ["assistant", R]], QA, ()),
    ("utterances", {"chat_history": spoken("role", "message", ("USER", Q), ("CHATBOT", R))}, QA, ()),
    ("utterances", {"turns": spoken("speaker_role", "utterance", ("Customer", Q), ("Agent", R))}, QA, ()),
    # the APIs
    ("messages", {"system": "Be brief.", "messages": chat(*QA)}, BRIEF, ()),
    ("messages", {"system": [{"text": "Be brief."}], "messages": chat((U, [{"text": Q}]), (A, R))}, BRIEF, ()),
    ("messages", {"messages": [*chat((U, Q)), {"role": A, "content": None, "refusal": R}]}, QA, ()),
    ("messages", {"messages": [{"role": U, "text": Q}, {"role": A, "text": R}]}, QA, ()),
    ("gemini", {"contents": GEMINI_CHAT}, QA, ()),
    ("gemini", {"systemInstruction": {"parts": [{"text": "Be brief."}]}, "contents": GEMINI_CHAT}, BRIEF, ()),
    ("claude_export", {"uuid": "u", "name": "n", "chat_messages": CLAUDE}, QA, ()),
    ("chatgpt_export", EXPORT, QA, ()),
    # CoQA
    ("question_lists", {"story": "Be brief.", "questions": [Q], "answers": {"input_text": [R]}}, BRIEF, ()),
    ("question_lists", {"context": "Be brief.", "questions": [{"text": Q}], "answers": [{"text": R}]}, BRIEF, ()),
    # ConvAI2
    ("convai", {"personality": ["Be brief."], "utterances": [{"history": [Q], "candidates": ["No.", R]}]}, BRIEF, ()),
    # strings of templates: ChatML, Llama 2 and 3, Zephyr, Gemma, Baize, Vicuna, MOSS, Glaive; SAMSum, DialogSum
    ("separated", {"text": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{R}<|im_end|>\n"}, QA, ()),
    ("separated", {"text": LLAMA}, [(S, "Be brief."), *MORE], ()),
    ("separated", {"text": f"<|begin_of_text|>{HEADERS}"}, QA, ()),
    ("separated", {"text": f"<|user|>\n{Q}</s>\n<|assistant|>\n{R}</s>"}, QA, ()),
    ("separated", {"text": f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n{R}<end_of_turn>"},
     QA, ()),
    ("separated", {"input": f"The conversation between human and AI assistant.\n[|Human|] {Q}\n[|AI|] {R}\n[|Human|] "},
     QA, ()),
    ("separated", {"text": f"USER: {Q} ASSISTANT: {R}</s>"}, QA, ()),
    ("separated", {"plain_text": f"[Human]: {Q}<eoh>\n[MOSS]: {R}<eoa>"}, QA, ()),
    ("separated", {"system": "SYSTEM: Be brief.", "chat": f"USER: {Q}\n\n\nASSISTANT: {R} <|endoftext|>"}, BRIEF, ()),
    ("separated", {"id": "1", "dialogue": f"Ann: {Q}\r\nBo: {R}", "summary": "s"}, QA, ()),
    ("separated", {"dialogue": f"#Person1#: {Q}\n#Person2#: {R}"}, QA, ()),
]  # fmt: skip

HH = "Human: a\n\nAssistant: b"
BY_NAME = [("Ann", "Hi"), ("Bo", "Hm"), ("Bo", "Hi")]
IN_ORDER = [(U, "Hi"), (A, "Hm"), (A, "Hi")]
#: As SHAPES: these and more.
RECORDS: list[tuple[str, Any, list[tuple[str, Any]], tuple[str, ...]]] = [
    ("utterances", {"utterances": spoken("speaker", "text", ("USER", Q), ("ASSISTANT", R))}, QA, ()),
    ("utterances", {"content": spoken("agent", "message", ("agent_1", Q + " "), ("agent_2", R + "\n"))}, QA, ()),
    ("utterances", {"dialog": spoken("speaker", "content", ("listener", R), ("speaker", Q))}, QA[::-1], ()),
    ("utterances", {"messages": chat(("usr", Q), ("sys", R))}, QA, ("messages",)),
    ("utterances", {"turns": spoken("speaker", "utterance", ("USER", Q), ("SYSTEM", R))}, QA, ()),
    ("utterances", {"id": "D1", "goal": {}, "log": [{"text": Q, "metadata": {}}, {"text": R}]}, QA, ()),
    ("utterances", {"dialogue": spoken("speaker", "text", (7, Q), (3, R))}, QA, ()),
    ("utterances", {"dialogue": spoken("speaker", "text", *BY_NAME)}, IN_ORDER, ()),
    ("utterances", {"conversation": chat(("X", " a\n"), ("Y", "b "))}, [(U, " a\n"), (A, "b ")], ()),
    ("pairs", {"conversation": [{"human": Q, "assistant": R}]}, QA, ()),
    ("pairs", {"history": [[Q, R]]}, QA, ()),
    ("pairs", [[Q, R], ["And", "so"]], [*QA, (U, "And"), (A, "so")], ()),
    ("pairs", {"system": "Be brief.", "dialog": [{"question": Q, "answer": R}]}, [(S, "Be brief."), *QA], ()),
    ("prompt_completion", {"prompt": Q, "completion": R}, QA, ()),
    ("prompt_completion", {"prompt": chat((U, Q)), "completion": chat((A, R))}, QA, ()),
    ("prompt_completion", {"system_prompt": "", "question": Q, "response": R}, QA, ()),
    ("prompt_completion", {"query": "a", "response": "b", "history": [[Q, R]]}, [*QA, (U, "a"), (A, "b")], ()),
    ("prompt_completion", {"instruction": "x", "context": "y", "response": "z"}, [(U, "x\ny"), (A, "z")], ()),
    ("prompt_completion", {"input": Q, "output": R}, QA, ()),
    ("separated", {"conversation": "Teacher: (focus)2:1?|EOM|Ann: 2: "}, [(A, "(focus)2:1?"), (U, "2:")], ()),
    ("separated", {"dialogue": "Ann: Hi|EOM|Bo: Hm|EOM|Bo: Hi|EOM| "}, IN_ORDER, ()),
    ("separated", {"text": f"\n\nHuman: {Q}\n\nAssistant: {R}"}, QA, ()),
    ("separated", {"text": f"### Human: {Q}### Assistant: {R}"}, QA, ()),
    ("lists", [Q, R], QA, ()),
    ("dailydialog", f"{Q} __eou__ {R} __eou__", QA, ()),
    ("dailydialog", f"{Q}__eou__{R}\t1\t2 1\t0 0", QA, ()),
    ("tsv_pairs", f"{Q}\t{R}", QA, ()),
    ("tsv_pairs", f"{Q}\t {R} \tAnd then?", [*QA, (U, "And then?")], ()),
    (
        "preference",
        {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": R}, "rejected": {}},
        QA,
        ("sharegpt",),
    ),
    (
        "preference",
        {"prompt": Q, "chosen": chat(*QA), "rejected": chat((U, Q), (A, "No.")), "messages": chat(*QA)},
        QA,
        ("messages",),
    ),
    ("preference", {"prompt": chat((U, Q)), "chosen": chat((A, R)), "rejected": []}, QA, ()),
    ("preference", {"prompt": chat((U, Q)), "chosen": chat(*QA), "rejected": []}, QA, ()),
    ("preference", {"chosen_messages": chat(*QA), "rejected_messages": []}, QA, ()),
    ("preference", {"prompt": Q, "chosen": R, "rejected": "No."}, QA, ()),
    ("preference", {"instruction": "a", "input": "b", "chosen": R, "rejected": ""}, [(U, "a\nb"), (A, R)], ()),
    ("preference", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {R}", "rejected": ""}, QA, ()),
    ("preference", {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {R}", "rejected": " No."}, QA, ()),
    ("preference", {"prompt": f"Human: {Q}", "chosen": R, "rejected": "No."}, QA, ()),
    ("preference", {"prompt": f"### Human: {Q}### Assistant: Until", "chosen": " six.", "rejected": ""}, QA, ()),
    ("preference", {"prompt": Q, "chosen": HH, "rejected": ""}, [(U, Q), (A, HH)], ()),
    ("kto", {"messages": chat(*QA), "label": True}, QA, ("messages",)),
    ("kto", {"prompt": Q, "completion": R, "label": True}, QA, ("prompt_completion",)),
    ("kto", {"instruction": Q, "input": "", "output": R, "kto_tag": True}, QA, ("alpaca",)),
    ("moss", {"chat": {"turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n", "MOSS": f"<|MOSS|>: {R}<eom>\n"}}}, QA, ()),
    *SHAPES,
]

#: The formats that RECORDS covers; test_properties.py reads any JSON value with each.
COVERED_FORMATS = (
    "preference", "kto", "utterances", "moss", "pairs", "dailydialog", "lists", "separated", "prompt_completion",
    "personachat", "tsv_pairs", "threads", "gemini", "claude_export", "chatgpt_export", "question_lists", "convai",
)  # fmt: skip
