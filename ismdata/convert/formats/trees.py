"""Trees of messages, as OpenAssistant has them: every path from the root to a leaf is a conversation.

The paths of a tree share their beginnings. So that an answer is trained once and not once a path, `train` is false on
an assistant message that an earlier path of the tree already trains. Paths come depth-first, replies by rank.

Messages marked as deleted or with a negative review are left out with all that follows from them, as they are in the
"ready for export" files that OpenAssistant publishes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Paths
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of
from ismdata.convert.sources.grouping import Group, GroupBlock, by_key, narrowed, number_of
from ismdata.errors import Refused, shown

#: The most that the paths of one tree may come to, in characters and `_MESSAGE_COST` for each message: the beginnings
#: repeat, so that a small file can mean any amount of text.
MOST_TEXT = 1 << 26
_MESSAGE_COST = 100

#: What hangs a message on its tree.
_LINKS = ("message_tree_id", "message_id", "parent_id")
#: Fields of a tree or its root that say something of all its paths.
_META = ("message_tree_id", "tree_state", "lang")
#: Message fields that are read.
_READ = {*_META, "message_id", "parent_id", "text", "role", "rank", "deleted", "review_result", "replies"}
#: What messages that are cut off are counted as, among the fields that are left out.
_CUT = "messages deleted or with a negative review, and the replies below them"


@dataclass(kw_only=True, eq=False, repr=False)
class Node:
    """A message of a tree. `sound`: it makes a message of a conversation; `trained`: in some earlier path."""

    fields: Mapping[str, Any]
    replies: list[Node] = field(default_factory=list)
    sound: bool = False
    trained: bool = False

    @property
    def cut(self) -> bool:
        return self.fields.get("deleted") is True or self.fields.get("review_result") is False

    @property
    def message(self) -> dict[str, Any]:
        return {"role": self.fields.get("role"), "content": self.fields.get("text")}


@dataclass(frozen=True, kw_only=True)
class TreeRows(CorpusFormat):
    """A record is the list of the rows of one tree; a row is a message with the id of its parent."""

    roles: Mapping[str, str] = field(default_factory=lambda: dict(ROLE_NAMES))
    tree: Paths = "all"

    @property
    def expects(self) -> str:
        return "rows of message_tree_id, message_id, parent_id, role, text"

    def matches(self, record: Any) -> bool:
        names = {"message_tree_id", "message_id", "parent_id", "role", "text"}
        return isinstance(record, dict) and names <= record.keys()

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        for block, place in by_key(blocks, _tree_id, columns=_LINKS):
            yield GroupBlock(groups=[part for group in block.groups for part in hanging_together(group)]), place

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        nodes = {_own_id(row): Node(fields=row) for row in rows}
        roots = []
        for row in rows:
            node, parent = nodes[_own_id(row)], _id(row.get("parent_id"))
            if parent is None:
                roots.append(node)
            elif parent in nodes:
                nodes[parent].replies.append(node)
            else:
                raise Refused("broken_tree", f"the parent {shown(parent)} is no message of the tree")
        first = rows[0] if rows else {}
        return _drafts(roots, {name: first.get(name) for name in _META}, self.roles, self.tree)


@dataclass(frozen=True, kw_only=True)
class NestedTrees(CorpusFormat):
    """A record is a tree: its `prompt` is a message with its `replies` inside of it."""

    roles: Mapping[str, str] = field(default_factory=lambda: dict(ROLE_NAMES))
    tree: Paths = "all"

    @property
    def expects(self) -> str:
        return "prompt.text/role/replies"

    def matches(self, record: Any) -> bool:
        prompt = record.get("prompt") if isinstance(record, dict) else None
        return isinstance(prompt, dict) and "text" in prompt and ("replies" in prompt or "message_tree_id" in record)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = fields_of(record)
        root = Node(fields=fields_of(fields.get("prompt")))
        waiting = [root]
        while waiting:
            node = waiting.pop()
            replies = node.fields.get("replies")
            if replies is not None and not isinstance(replies, list):
                found = f"the replies to message {node_name(node.fields)} are {kind_of(replies)}"
                raise Refused("invalid_field", f"{found}; expected a list of messages")
            # What is no object becomes a message without a role: its paths are refused, the others are not.
            node.replies = [Node(fields=reply if isinstance(reply, dict) else {}) for reply in replies or ()]
            waiting += node.replies
        meta = {name: fields.get(name, root.fields.get(name)) for name in _META}
        return _drafts([root], meta, self.roles, self.tree)


def hanging_together(group: Group) -> Iterator[Group]:
    """The rows of a tree as one group, and beside it a refused one for each part that does not hang on its root.

    A part hangs loose when a parent is missing or when its messages are each other's ancestors. Of rows with the same
    id the first counts.
    """
    if group.refusal is not None:
        yield group
        return
    at: dict[Hashable, int] = {}
    parents: list[Hashable] = []
    refused: dict[int, str] = {}
    narrow: dict[int, Block] = {}
    for row, (block, number) in enumerate(group.rows):
        if id(block) not in narrow:
            narrow[id(block)] = narrowed(block, _LINKS)
        fields = narrow[id(block)].record(number)
        own = _own_id(fields)
        parents.append(_id(fields.get("parent_id")))
        if own in at:
            earlier_block, earlier = group.rows[at[own]]
            refused[row] = f"message {node_name(fields)} stands at {earlier_block.numbers[earlier]} already"
        else:
            at[own] = row
    replies: dict[int, list[int]] = {}
    for row, parent in enumerate(parents):
        if row not in refused and parent is not None and parent in at:
            replies.setdefault(at[parent], []).append(row)
    unseen = dict.fromkeys(row for row in range(len(parents)) if row not in refused)

    def take(start: int) -> list[int]:
        taken, waiting = [], [start]
        while waiting:
            row = waiting.pop()
            if row in unseen:
                del unseen[row]
                taken.append(row)
                waiting += replies.get(row, ())
        return sorted(taken)

    whole = [row for root, parent in enumerate(parents) if parent is None and root in unseen for row in take(root)]
    parts = []
    for row, parent in enumerate(parents):
        if row in unseen and parent not in at:
            detail = f"the parent {shown(parent)} is no message of the tree"
            parts.append((take(row), f"{detail}; expected all its messages in one file"))
    for start in list(unseen):
        if start not in unseen:
            continue
        # A row can hang on a ring without being of it: go up until one comes again, then take all that is below.
        row, above = start, set()
        while row not in above:
            above.add(row)
            row = at[parents[row]]
        detail = "the message is its own ancestor"
        parts.append((take(row), f"{detail}; expected parents that lead to a message without one"))
    parts += [([row], detail) for row, detail in refused.items()]
    if whole:
        yield Group(rows=[group.rows[row] for row in sorted(whole)])
    for rows, detail in sorted(parts):
        yield Group(rows=[group.rows[row] for row in rows], refusal=Refused("broken_tree", detail))


def _drafts(roots: Sequence[Node], meta: dict[str, Any], roles: Mapping[str, str], which: Paths) -> list[Draft]:
    rules = Rules(roles=roles)
    ignored: list[str] = []
    above = Node(fields={}, replies=list(roots))
    for node in _prepared(above, ignored):
        node.sound = _is_sound(node, rules)
    if roots and not above.replies:
        raise Refused("rejected", "the first message of the tree is marked as deleted or has a negative review")
    tree = None if meta["message_tree_id"] is None else str(meta["message_tree_id"])
    drafts: list[Draft] = []
    for number, path in enumerate(_paths(above.replies, which), 1):
        own = _id(path[-1].fields.get("message_id"))
        drafts.append(
            Draft(
                messages=[_in_path(node, roles) for node in path],
                id=own,
                extra=meta,
                ignored=ignored,
                part="" if own is not None else f"path{number}",
                kin=tree,
            )
        )
        ignored = []
        # A path that is refused for one of its messages trains none of them.
        if all(node.sound for node in path):
            for node in path:
                node.trained = True
    return drafts


def _in_path(node: Node, roles: Mapping[str, str]) -> dict[str, Any]:
    role = node.fields.get("role")
    if node.trained and isinstance(role, str) and roles.get(role.lower()) == "assistant":
        return {**node.message, "train": False}
    return node.message


def _is_sound(node: Node, rules: Rules) -> bool:
    try:
        canonicalize(Draft(messages=[node.message], id=_id(node.fields.get("message_id"))), rules)
    except Refused:
        return False
    return True


def _prepared(above: Node, ignored: list[str]) -> Iterator[Node]:
    """The messages that are kept; replies that are not are cut off on the way, the others put in order of rank."""
    waiting = [above]
    while waiting:
        node = waiting.pop()
        ignored += [name for name, value in node.fields.items() if name not in _READ and value is not None]
        cut = [reply for reply in node.replies if reply.cut]
        while cut:
            ignored.append(_CUT)
            cut += cut.pop().replies
        node.replies = sorted((reply for reply in node.replies if not reply.cut), key=_rank)
        waiting += node.replies
        yield node


def _rank(node: Node) -> tuple[bool, Any]:
    rank = number_of(node.fields.get("rank"))
    return rank is None, rank or 0


def _paths(roots: Sequence[Node], which: Paths) -> Iterator[list[Node]]:
    """The messages of each path, depth-first; under "best" only the first reply to each message, of the first root."""
    path: list[Node] = []
    costs = [0]  # of the first 0, 1, … messages of the path
    total = 0
    waiting = [(root, 0) for root in reversed(roots if which == "all" else roots[:1])]
    while waiting:
        node, depth = waiting.pop()
        del path[depth:], costs[depth + 1 :]
        path.append(node)
        text = node.fields.get("text")
        costs.append(costs[-1] + _MESSAGE_COST + (len(text) if isinstance(text, str) else 0))
        replies = node.replies if which == "all" else node.replies[:1]
        waiting += [(reply, depth + 1) for reply in reversed(replies)]
        if not replies:
            total += costs[-1]
            if total > MOST_TEXT:
                limit = f"more than {MOST_TEXT:,} characters"
                raise Refused("too_many_paths", f"the paths of the tree come to {limit}; read one with --tree best")
            yield list(path)


def _tree_id(row: Any) -> Hashable:
    fields = fields_of(row)
    tree = _id(fields.get("message_tree_id"))
    if tree is None:
        found = shown(fields.get("message_tree_id"))
        raise Refused("missing_field", f"message_tree_id is {found}; expected the id of the tree")
    _own_id(fields)
    parent = fields.get("parent_id")
    if parent not in (None, "") and _id(parent) is None:
        raise Refused("invalid_field", f"parent_id is {kind_of(parent)}; expected the id of a message, or null")
    return tree


def _own_id(fields: Mapping[str, Any]) -> Hashable:
    own = _id(fields.get("message_id"))
    if own is None:
        raise Refused("missing_field", f"message_id is {shown(fields.get('message_id'))}; expected the message's id")
    return own


def _id(value: Any) -> str | int | None:
    """An id, None where there is none."""
    return value if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def node_name(fields: Mapping[str, Any]) -> str:
    return shown(fields.get("message_id", "(without an id)"))


TREE_ROWS = TreeRows()
NESTED_TREES = NestedTrees()
