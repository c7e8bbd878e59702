"""Files as chat programs, agents and task-oriented corpora write them, with made-up words: name, text and talks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.support.shapes import QA, A, Q, R, S, T, U, chat, spoken

Talk = list[tuple[str, str | None]]


class Export(NamedTuple):
    """A file: the format it is taken for, its name, its text and its conversations."""

    format: str
    name: str
    text: str
    talks: list[Talk]


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def code_row(own: str, above: str | None, role: str, content: Any, **more: Any) -> dict[str, Any]:
    """A line of Claude Code."""
    message = {"role": role, "content": content, **({"id": more.pop("answer")} if "answer" in more else {})}
    return {"type": role, "sessionId": "s1", "uuid": own, "parentUuid": above, "message": message, **more}


def codex_row(kind: str, **item: Any) -> dict[str, Any]:
    return {"timestamp": "2025-01-01", "type": kind, "payload": item}


TELEGRAM = {
    "name": "Bo", "type": "personal_chat", "id": 7,
    "messages": [
        {"id": 1, "type": "service", "actor": "Bo", "actor_id": "user1", "action": "phone_call", "text": ""},
        {"id": 2, "type": "message", "from": "Bo", "from_id": "user1", "text": Q},
        {"id": 3, "type": "message", "from": "Cy", "from_id": "user2", "text": "", "photo": "a.jpg"},
        {"id": 4, "type": "message", "from": "Cy", "from_id": "user2",
         "text": ["Until ", {"type": "bold", "text": "six."}]},
    ],
}  # fmt: skip
SLACK = [
    {"type": "message", "user": "U1", "text": Q, "ts": "1.0"},
    {"type": "message", "user": "U2", "text": R, "ts": "2.0"},
]
DISCORD = {
    "guild": {"id": "1"}, "channel": {"id": "9", "name": "talk"},
    "messages": [
        {"id": "1", "type": "Default", "content": Q, "author": {"id": "5", "name": "bo"}, "attachments": []},
        {"id": "2", "type": "ChannelPinnedMessage", "content": "Pinned.", "author": {"id": "5", "name": "bo"}},
        {"id": "3", "type": "Reply", "content": R, "author": {"id": "6", "name": "cy"}, "attachments": []},
    ],
}  # fmt: skip
MESSENGER = {
    "participants": [{"name": "Bo"}, {"name": "JÃ¶rg"}], "title": "Bo", "thread_path": "inbox/bo",
    "messages": [
        {"sender_name": "JÃ¶rg", "timestamp_ms": 3, "content": R},
        {"sender_name": "JÃ¶rg", "timestamp_ms": 2, "photos": [{"uri": "a.jpg"}]},
        {"sender_name": "Bo", "timestamp_ms": 1, "content": Q},
    ],
}  # fmt: skip
GOOGLE = {"messages": [
    {"creator": {"name": "Bo", "email": "b@x"}, "created_date": "Monday", "text": Q, "topic_id": "1"},
    {"creator": {"name": "Cy", "email": "c@x"}, "created_date": "Monday", "text": R, "topic_id": "2"},
]}  # fmt: skip
TAVERN = [
    {"user_name": "Kim", "character_name": "Ada", "create_date": "2024-1-1", "chat_metadata": {}},
    {"name": "Ada", "is_user": False, "mes": "Hello!", "swipes": ["Hello!", "Hi!"], "swipe_id": 0},
    {"name": "Kim", "is_user": True, "mes": Q},
    {"name": "Ada", "is_user": False, "is_system": True, "mes": "hidden"},
    {"name": "Ada", "is_user": False, "mes": R},
]  # fmt: skip
WEBUI = {"internal": [["<|BEGIN-VISIBLE-CHAT|>", "Hello!"], [Q, R]], "visible": [["", "Hello!"], [Q, R]]}
GREETED = [(A, "Hello!"), *QA]
OPEN_WEBUI = {"id": "1", "title": "t", "chat": {"history": {"currentId": "c", "messages": {
    "a": {"id": "a", "parentId": None, "childrenIds": ["b", "c"], "role": U, "content": Q},
    "b": {"id": "b", "parentId": "a", "childrenIds": [], "role": A, "content": "No."},
    "c": {"id": "c", "parentId": "a", "childrenIds": [], "role": A, "content": R, "model": "m"},
}}, "params": {"system": "Be brief."}}}  # fmt: skip
STUDIO = {"name": "t", "messages": [
    {"versions": [{"type": "singleStep", "role": U, "content": [{"type": "text", "text": Q}]}], "currentlySelected": 0},
    {"versions": [
        {"type": "multiStep", "role": A, "steps": [{"content": [{"type": "text", "text": "No."}]}]},
        {"type": "multiStep", "role": A, "steps": [
            {"type": "contentBlock", "style": {"type": "thinking"}, "content": [{"type": "text", "text": "hm"}]},
            {"type": "contentBlock", "content": [{"type": "text", "text": R}]}, {"type": "debugInfoBlock"}]},
    ], "currentlySelected": 1},
]}  # fmt: skip
CODE = [
    {"type": "summary", "summary": "x", "leafUuid": "7"},
    code_row("1", None, U, Q),
    code_row("2", "1", A, [{"type": "thinking", "thinking": "hm", "signature": "x"}], answer="m1"),
    code_row("3", "2", A, [{"type": "text", "text": "Looking."}], answer="m1"),
    code_row("4", "3", A, [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}], answer="m1"),
    code_row("5", "4", A, [{"type": "tool_use", "id": "t2", "name": "g", "input": {}}], answer="m1"),
    code_row("6", "4", U, [{"type": "tool_result", "tool_use_id": "t1", "content": "1"}]),
    code_row("7", "5", U, [{"type": "tool_result", "tool_use_id": "t2", "content": "2"}]),
    code_row("8", "7", A, [{"type": "text", "text": "An older answer."}]),
    code_row("9", "7", A, [{"type": "text", "text": R}], answer="m2"),
    code_row("x", None, U, "Do that.", isSidechain=True),
]
CODEX = [
    codex_row("session_meta", id="c1", cwd="/x"),
    codex_row("response_item", type="message", role=U, content=[{"type": "input_text", "text": Q}]),
    codex_row("event_msg", type="user_message", message=Q),
    codex_row("response_item", type="reasoning", summary=[]),
    codex_row("response_item", type="function_call", name="f", arguments="{}", call_id="1"),
    codex_row("response_item", type="function_call_output", call_id="1", output="14"),
    codex_row("response_item", type="message", role=A, content=[{"type": "output_text", "text": R}]),
]
LANGCHAIN = [{"type": "human", "data": {"content": Q}}, {"type": "ai", "data": {"content": "", "tool_calls": [
    {"name": "f", "args": {}, "id": "1"}]}}, {"type": "tool", "data": {"content": "14", "tool_call_id": "1"}},
    {"type": "ai", "data": {"content": R, "response_metadata": {"model": "m"}}}]  # fmt: skip
CALLED: Talk = [(U, Q), (A, None), (T, "14"), (A, R)]
LC = [{"lc": 1, "type": "constructor", "id": ["langchain", "schema", name], "kwargs": {"content": text}}
      for name, text in (("HumanMessage", Q), ("AIMessage", R))]  # fmt: skip
ASKED, ANSWERED = {"model": "m", "messages": chat((U, Q))}, {"choices": [{"message": chat((A, R))[0]}]}
WHATSAPP_TALK: Talk = [(U, "Is it\n\n  open?"), (A, "Until six: or so."), (A, "OK")]


def whatsapp(form: str, *more: str) -> str:
    return "".join(form.format(name=name, text=text) + "\n" for name, text in (
        ("Bo", "Is it\n\n  open?"), ("Cy Zed", "Until six: or so."), *(("Cy Zed", one) for one in (*more, "OK")),
    ))  # fmt: skip


EXPORTS = [
    Export("telegram", "result.json", json.dumps(TELEGRAM), [QA]),
    Export("telegram", "result.json", json.dumps(TELEGRAM, indent=1), [QA]),
    Export("telegram", "all.json", json.dumps({"about": "x", "chats": {"list": [TELEGRAM] * 2}}, indent=1),
           [QA, QA]),
    Export("telegram", "bot.json", json.dumps({**TELEGRAM, "type": "bot_chat"}), [[(A, Q), (U, R)]]),
    Export("slack", "2024-01-01.json", json.dumps(SLACK, indent=4), [QA]),
    Export("slack", "thread.json", json.dumps([{**SLACK[0], "thread_ts": "1.0"}, {**SLACK[1], "thread_ts": "1.0"},
           {**SLACK[0], "ts": "3.0"}, {**SLACK[1], "ts": "4.0"}]), [QA, QA]),
    Export("slack", "marks.json", json.dumps([{**SLACK[0], "text": "a &lt; <http://b.c|b>"}, SLACK[1]]),
           [[(U, "a < b"), QA[1]]]),
    Export("discord", "channel.json", json.dumps(DISCORD, indent=2), [QA]),
    Export("messenger", "message_1.json", json.dumps(MESSENGER, indent=2), [QA]),
    Export("messenger", "Bo.json", json.dumps({"participants": ["Bo", "Cy"], "threadName": "Bo", "messages": [
        {"senderName": "Bo", "text": Q, "timestamp": 1, "media": []},
        {"senderName": "Cy", "text": R, "timestamp": 2, "media": []}]}), [QA]),
    Export("google_chat", "messages.json", json.dumps(GOOGLE), [QA]),
    Export("sillytavern", "chat.jsonl", lines(*TAVERN), [GREETED]),
    Export("sillytavern", "chats.jsonl", lines(*TAVERN, *TAVERN), [GREETED, GREETED]),
    Export("text_generation_webui", "log.json", json.dumps(WEBUI), [GREETED]),
    Export("text_generation_webui", "log.json", json.dumps(WEBUI, indent=2), [GREETED]),
    Export("open_webui", "export.json", json.dumps([OPEN_WEBUI]), [[(S, "Be brief."), *QA]]),
    Export("lm_studio", "1.conversation.json", json.dumps(STUDIO, indent=2), [QA]),
    Export("claude_code", "s1.jsonl", lines(*CODE), [[(U, Q), (A, "Looking."), (T, "1"), (T, "2"), (A, R)]]),
    Export("codex", "rollout.jsonl", lines(*CODEX), [CALLED]),
    Export("langchain", "lc.jsonl", lines({"messages": LANGCHAIN}, {"messages": LC}), [CALLED, QA]),
    Export("langchain", "lc.json", json.dumps(LANGCHAIN), [CALLED]),
    Export("langchain", "lc.json", json.dumps({"messages": spoken("type", "content", ("human", Q), ("ai", R))}), [QA]),
    Export("api_log", "log.jsonl", lines({"request": ASKED, "response": ANSWERED}), [QA]),
    Export("api_log", "runs.jsonl", lines({"id": "1", "inputs": {"messages": [LC[:1]]}, "outputs": {"generations": [[
        {"text": R, "message": LC[1]}]]}}), [QA]),
    Export("api_log", "state.jsonl", lines({"inputs": ASKED, "outputs": {"messages": chat(*QA)}}), [QA]),
    Export("api_log", "batch.jsonl", lines({"custom_id": "1", "request": {"body": ASKED}, "response": {
        "status_code": 200, "body": ANSWERED}}), [QA]),
    Export("api_log", "claude.jsonl", lines({"request": {**ASKED, "system": "Be brief."}, "response": {
        "role": A, "content": [{"type": "text", "text": R}], "stop_reason": "end_turn"}}), [[(S, "Be brief."), *QA]]),
    Export("described", "kvret.json", json.dumps([{"dialogue": [
        {"turn": "driver", "data": {"end_dialogue": False, "utterance": Q}},
        {"turn": "assistant", "data": {"utterance": R}}], "scenario": {}}]), [QA]),
    Export("described", "camrest.json", json.dumps([{"dialogue_id": 0, "dial": [
        {"turn": 0, "usr": {"transcript": Q, "slu": []}, "sys": {"sent": R, "DA": []}}]}]), [QA]),
    Export("described", "sim.json", json.dumps([{"dialogue_id": "1", "turns": [
        {"user_utterance": {"text": Q}}, {"system_utterance": {"text": R}, "user_utterance": {"text": Q}}]}]),
        [[*QA, (U, Q)]]),
    Export("described", "imcs.json", json.dumps({"10": {"dialogue": [
        {"sentence_id": "1", "speaker": "患者", "sentence": Q}, {"speaker": "医生", "sentence": R}]}}), [QA]),
    Export("described", "doc2dial.json", json.dumps({"dial_data": {"a": {"x": [{"dial_id": "1", "turns": [
        {"turn_id": 1, "role": "user", "utterance": Q}, {"turn_id": 2, "role": "agent", "utterance": R}]}] * 2}}}),
        [QA, QA]),
    Export("described", "bst.jsonl", lines({"personas": ["a"], "previous_utterance": [Q, R], "free_messages": ["b"],
        "guided_messages": ["c"]}), [[*QA, (U, "b"), (A, "c")]]),
    Export("described", "dream.json", json.dumps([[["W: " + Q, "M: " + R], [{"question": "q"}], "4-1"]]),
           [QA]),
    *(Export("whatsapp", "_chat.txt", whatsapp(form), [WHATSAPP_TALK]) for form in (
        "[31.12.20, 22:15:01] {name}: {text}",
        "\u200e[12/31/20, 10:15:01\u202fPM] {name}: {text}",
        "[2020-12-31, 22:15:01] {name}: {text}",
        "31/12/2020, 22:15 - {name}: {text}",
        "31.12.20, 22:15 - {name}: {text}",
        "12/31/20, 10:15 PM - {name}: {text}",
        "31/12/20 22:15 - {name}: {text}",
        "31/12/2020, 10:15\u202fp. m. - {name}: {text}",
        "2020/12/31, 22:15 - {name}: {text}",
    )),
    Export("whatsapp", "_chat.txt", whatsapp("[31.12.20, 22:15:01] {name}: {text}", "\u200eimage omitted",
           "\u200e<attached: 1.jpg>"), [WHATSAPP_TALK]),
    Export("whatsapp", "a.txt", "31.12.20, 22:14 - Messages and calls are end-to-end encrypted.\n" + whatsapp(
        "31.12.20, 22:15 - {name}: {text}", "<Media omitted>", "IMG-1.jpg (file attached)", "This message was deleted"),
        [WHATSAPP_TALK]),
]  # fmt: skip
