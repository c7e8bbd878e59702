"""Trees of messages, as OpenAssistant has them: every path from the root to a leaf is a conversation.

The paths of a tree share their beginnings. To train each answer once, not once per path, `train` is false on an
assistant message that an earlier path of the tree already trains. Paths come depth-first, replies in order of rank.

Messages that are deleted or have a negative review are left out with all replies below them, as in the "ready for
export" files that OpenAssistant publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Paths
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of
from ismdata.convert.sources.grouping import Group, GroupBlock, group_by_key, parse_number, select_columns
from ismdata.errors import Refused, shown

#: Limit for the paths of one tree together: their characters, and `_MESSAGE_COST` per message. Paths repeat their
#: beginnings, so a small file could otherwise expand without bound.
MOST_TEXT = 1 << 26
_MESSAGE_COST = 100

#: The fields that give a message its place in its tree.
_LINKS = ("message_tree_id", "message_id", "parent_id")
#: Fields of a tree or its root that describe all its paths.
_META = ("message_tree_id", "tree_state", "lang")
#: Message fields that are read.
_READ = {*_META, "message_id", "parent_id", "text", "role", "rank", "deleted", "review_result", "replies"}
#: The name under which removed messages are counted among the fields that are left out.
_REMOVED = "messages deleted or with a negative review, and the replies below them"


@dataclass(kw_only=True, eq=False, repr=False)
class Node:
    """A message of a tree. `usable`: a conversation can contain it. `trained`: an earlier path trains it."""

    fields: Mapping[str, Any]
    replies: list[Node] = field(default_factory=list)
    usable: bool = False
    trained: bool = False

    @property
    def removed(self) -> bool:
        return self.fields.get("deleted") is True or self.fields.get("review_result") is False

    @property
    def message(self) -> dict[str, Any]:
        return {"role": self.fields.get("role"), "content": self.fields.get("text")}


@dataclass(frozen=True, kw_only=True)
class TreeFormat(CorpusFormat):
    """`roles` maps names in lower case to roles; `tree` says which paths are read."""

    roles: Mapping[str, str] = field(default_factory=lambda: dict(ROLE_NAMES))
    tree: Paths = "all"

    def tree_drafts(self, roots: Sequence[Node], meta: dict[str, Any]) -> list[Draft]:
        """One draft per path of a tree. Raises Refused if its root is removed."""
        rules = Rules(roles=self.roles)
        ignored: list[str] = []
        above = Node(fields={}, replies=list(roots))
        for node in _prepare(above, ignored):
            node.usable = _is_usable(node, rules)
        if roots and not above.replies:
            raise Refused("rejected", "the first message of the tree is deleted or has a negative review")
        tree = None if meta["message_tree_id"] is None else str(meta["message_tree_id"])
        drafts: list[Draft] = []
        for number, path in enumerate(_paths(above.replies, self.tree), 1):
            own_id = _id(path[-1].fields.get("message_id"))
            drafts.append(
                Draft(
                    messages=[self._path_message(node) for node in path],
                    id=own_id,
                    extra=meta,
                    ignored=ignored,
                    id_suffix="" if own_id is not None else f"path{number}",
                    split_group=tree,
                )
            )
            ignored = []
            # A path with an unusable message is refused, so it trains none of its messages.
            if all(node.usable for node in path):
                for node in path:
                    node.trained = True
        return drafts

    def _path_message(self, node: Node) -> dict[str, Any]:
        role = node.fields.get("role")
        if node.trained and isinstance(role, str) and self.roles.get(role.lower()) == "assistant":
            return {**node.message, "train": False}
        return node.message


@dataclass(frozen=True, kw_only=True)
class TreeRows(TreeFormat):
    """A record is the list of the rows of one tree; a row is a message with the id of its parent."""

    @property
    def expects(self) -> str:
        return "rows of message_tree_id, message_id, parent_id, role, text"

    def matches(self, record: Any) -> bool:
        names = {"message_tree_id", "message_id", "parent_id", "role", "text"}
        return isinstance(record, dict) and names <= record.keys()

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        for block, place in group_by_key(blocks, _tree_id, columns=_LINKS):
            yield GroupBlock(groups=[part for group in block.groups for part in split_connected(group)]), place

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        first = rows[0] if rows else {}
        return self.row_drafts(rows, {name: first.get(name) for name in _META})

    def row_drafts(self, rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> list[Draft]:
        """One draft per path of a tree, given its rows. Raises Refused."""
        nodes = {_message_id(row): Node(fields=row) for row in rows}
        roots = []
        for row in rows:
            node, parent = nodes[_message_id(row)], _id(row.get("parent_id"))
            if parent is None:
                roots.append(node)
            elif parent in nodes:
                nodes[parent].replies.append(node)
            else:
                raise _missing_parent(parent)
        return self.tree_drafts(roots, meta)


@dataclass(frozen=True, kw_only=True)
class NestedTrees(TreeFormat):
    """A record is a tree: its `prompt` is a message that contains its `replies`."""

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
                found = f"the replies to message {_name_of(node.fields)} are {kind_of(replies)}"
                raise Refused("invalid_field", f"{found}; expected a list of messages")
            # A reply that is no object becomes a message without a role: only the paths through it are refused.
            node.replies = [Node(fields=reply if isinstance(reply, dict) else {}) for reply in replies or ()]
            waiting += node.replies
        return self.tree_drafts([root], {name: fields.get(name, root.fields.get(name)) for name in _META})


def _links_of(fields: Mapping[str, Any]) -> tuple[Hashable, Hashable]:
    return _message_id(fields), _id(fields.get("parent_id"))


def split_connected(
    group: Group,
    links: Callable[[Mapping[str, Any]], tuple[Hashable, Hashable]] = _links_of,
    *,
    columns: Collection[str] | None = _LINKS,
    by_root: bool = False,
) -> Iterator[Group]:
    """The rows of a tree that connect to its root, as one group, then a refused group for each other part.

    `links` returns the id of a row and that of its parent, from the fields `columns` (None: all). `by_root` makes a
    group of the rows below each root.

    Parts that do not connect are those with a missing parent, those whose messages are each other's ancestors, and
    rows that repeat the id of an earlier row.
    """
    if group.refusal is not None:
        yield group
        return
    at: dict[Hashable, int] = {}
    parents: list[Hashable] = []
    repeated: dict[int, str] = {}
    narrow: dict[int, Block] = {}
    for row, (block, number) in enumerate(group.rows):
        if id(block) not in narrow:
            narrow[id(block)] = block if columns is None else select_columns(block, columns)
        own, parent = links(narrow[id(block)].record(number))
        parents.append(parent)
        if own in at:
            earlier_block, earlier = group.rows[at[own]]
            place = earlier_block.numbers[earlier]
            repeated[row] = f"found message {shown(own)} again, first at {place}; expected each id once"
        else:
            at[own] = row
    replies: dict[int, list[int]] = {}
    for row, parent in enumerate(parents):
        if row not in repeated and parent is not None and parent in at:
            replies.setdefault(at[parent], []).append(row)
    unseen = dict.fromkeys(row for row in range(len(parents)) if row not in repeated)

    def take_below(start: int) -> list[int]:
        taken, waiting = [], [start]
        while waiting:
            row = waiting.pop()
            if row in unseen:
                del unseen[row]
                taken.append(row)
                waiting += replies.get(row, ())
        return sorted(taken)

    roots = [row for row, parent in enumerate(parents) if parent is None]
    wholes = [take_below(root) for root in roots if root in unseen]
    if not by_root:
        wholes = [[row for rows in wholes for row in rows]]
    parts = []
    for row, parent in enumerate(parents):
        if row in unseen and parent not in at:
            parts.append((take_below(row), _missing_parent(parent).detail))
    for start in list(unseen):
        if start not in unseen:
            continue
        # The row is in a circle or below one: go up until a row repeats, which is in it; then take all rows below.
        row, above = start, set()
        while row not in above:
            above.add(row)
            row = at[parents[row]]
        detail = "the message is its own ancestor; expected parents that lead to a message without a parent"
        parts.append((take_below(row), detail))
    parts += [([row], detail) for row, detail in repeated.items()]
    for whole in filter(None, wholes):
        yield Group(rows=[group.rows[row] for row in sorted(whole)])
    for rows, detail in sorted(parts):
        yield Group(rows=[group.rows[row] for row in rows], refusal=Refused("broken_tree", detail))


def _missing_parent(parent: Hashable) -> Refused:
    found = f"the parent {shown(parent)} is no message of the tree"
    return Refused("broken_tree", f"{found}; expected all messages of a tree in one file")


def _is_usable(node: Node, rules: Rules) -> bool:
    try:
        canonicalize(Draft(messages=[node.message], id=_id(node.fields.get("message_id"))), rules)
    except Refused:
        return False
    return True


def _prepare(above: Node, ignored: list[str]) -> Iterator[Node]:
    """Each message that is kept, after its replies have been sorted by rank and the removed ones dropped."""
    waiting = [above]
    while waiting:
        node = waiting.pop()
        ignored += [name for name, value in node.fields.items() if name not in _READ and value is not None]
        removed = [reply for reply in node.replies if reply.removed]
        while removed:
            ignored.append(_REMOVED)
            removed += removed.pop().replies
        node.replies = sorted((reply for reply in node.replies if not reply.removed), key=_rank)
        waiting += node.replies
        yield node


def _rank(node: Node) -> tuple[bool, Any]:
    rank = parse_number(node.fields.get("rank"))
    return rank is None, rank or 0


def _paths(roots: Sequence[Node], which: Paths) -> Iterator[list[Node]]:
    """The messages of each path, depth-first; under "best" only the first root and the first reply to each message."""
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
                raise Refused(
                    "too_many_paths",
                    f"the paths of the tree have more than {MOST_TEXT:,} characters together; expected fewer. "
                    "Use --tree best to read only one path",
                )
            yield list(path)


def _tree_id(row: Any) -> Hashable:
    fields = fields_of(row)
    tree = _id(fields.get("message_tree_id"))
    if tree is None:
        found = shown(fields.get("message_tree_id"))
        raise Refused("missing_field", f"message_tree_id is {found}; expected the id of the tree")
    _message_id(fields)
    parent = fields.get("parent_id")
    if parent not in (None, "") and _id(parent) is None:
        raise Refused("invalid_field", f"parent_id is {kind_of(parent)}; expected the id of a message, or null")
    return tree


def _message_id(fields: Mapping[str, Any]) -> Hashable:
    own = _id(fields.get("message_id"))
    if own is None:
        raise Refused("missing_field", f"message_id is {shown(fields.get('message_id'))}; expected the message's id")
    return own


def _id(value: Any) -> str | int | None:
    """An id, None if the value is none."""
    return value if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _name_of(fields: Mapping[str, Any]) -> str:
    return shown(fields.get("message_id", "(without an id)"))


TREE_ROWS = TreeRows()
NESTED_TREES = NestedTrees()
