"""Documents that are rendered individually, because no skeleton covers them: slower, for any template and message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ismdata.conversation import Refusal
from ismdata.errors import Refused
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.requests import RequestKey
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.pack.texts import TextGroup
from ismdata.rendering import Piece, as_template_messages


@dataclass(frozen=True, kw_only=True)
class RenderedDocuments:
    """Documents rendered individually, their texts not encoded yet.

    Attributes:
        documents: For each document its pieces, or why the template refuses it.
    """

    documents: Mapping[RequestKey, tuple[Piece, ...] | Refusal]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all documents, in order."""
        return [piece for found in self.documents.values() if not isinstance(found, Refusal) for piece in found]

    def texts(self, first: int) -> list[TextGroup]:
        """Return the texts among the pieces; the place of piece k is `first + k`."""
        groups = []
        for opening in (False, True):
            chosen = [
                (first + k, "".join(map(str, piece.parts)))
                for k, piece in enumerate(self.pieces)
                if piece.ids is None and piece.opening is opening
            ]
            if chosen:
                places, texts = zip(*chosen, strict=True)
                array = pa.array(texts, pa.large_string())
                groups.append(TextGroup(texts=array, opening=opening, places=np.array(places, np.int64)))
        return groups


def render_individually(
    cache: SkeletonCache, batch: ConversationBatch, keys: Iterable[RequestKey]
) -> RenderedDocuments:
    """Render documents of a batch, each once, without encoding their texts."""
    documents: dict[RequestKey, tuple[Piece, ...] | Refusal] = {}
    for key in dict.fromkeys(keys):
        c, head, lo, hi = key
        try:
            messages, tools = as_template_messages(batch.conversation(c))
            documents[key] = cache.encoding.document(
                messages[:head] + messages[lo:hi],
                tools,
                encode=False,
                without_reasoning=cache.without_reasoning,
            )
        except Refused as error:
            documents[key] = Refusal(reason=error.reason, detail=error.detail)
    return RenderedDocuments(documents=documents)
