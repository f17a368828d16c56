"""What an index in Qdrant asks, answered by Qdrant's own engine, which comes as a library, as
an index in a folder answers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.index.build import build
from radapter_serve.index.folder import THUMBNAIL
from radapter_serve.index.index import open_index
from tests.helpers.projection import DIM
from tests.index.test_index import FakeRelease
from tests.index.test_qdrant import CONDITIONS, QUERY, photos, table

edge = pytest.importorskip("qdrant_edge", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration
__all__ = ["photos", "table"]


def _native(one: Any) -> Any:
    """A filter of the client's as one of the engine's."""
    from qdrant_client import models  # here: it takes a second to load

    if isinstance(one, models.Filter):
        parts: list[Any] = [
            [_native(each) for each in some] if some else None
            for some in (one.must, one.should, one.must_not)
        ]
        return edge.Filter(*parts)
    if isinstance(one, models.IsNullCondition):
        return edge.IsNullCondition(one.is_null.key)
    if isinstance(one.match, models.MatchAny):
        return edge.FieldCondition(one.key, match=edge.MatchAny(one.match.any))
    kind = edge.RangeDateTime if isinstance(one.range, models.DatetimeRange) else edge.RangeFloat
    return edge.FieldCondition(
        one.key, range=kind(**one.range.model_dump(mode="json", exclude_none=True))
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_conditions_and_scores(table: str, tmp_path: Path, indexed: bool) -> None:
    from radapter_serve.index.build import SCHEMAS, points_of
    from radapter_serve.index.qdrant import OWN, key_of, kind_of, to_filter

    build(table, tmp_path / "index", FakeRelease())
    local = open_index(tmp_path / "index")
    types = OWN | local.facts.plan.column_types
    vectors = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Dot)
    (tmp_path / "shard").mkdir()
    shard = edge.EdgeShard.create(str(tmp_path / "shard"), edge.EdgeConfig(vectors=vectors))
    for column in types if indexed else ():
        kind = kind_of(types[column])
        if kind is not None:
            schema = getattr(edge.PayloadSchemaType, SCHEMAS[kind].capitalize())
            shard.update(edge.UpdateOperation.create_field_index(key_of(column), schema))
    for batch in points_of(local):
        rows = zip(batch["ids"], batch["vectors"], batch["payloads"], strict=True)
        shard.update(edge.UpdateOperation.upsert_points([edge.Point(*row) for row in rows]))
    # The library takes true for 1 in a condition, which JSON does not.
    for where in [where for where in CONDITIONS if "flag" not in where]:
        request = edge.QueryRequest(
            limit=100,
            query=edge.Query.Nearest(QUERY.tolist()),
            filter=_native(to_filter(where, types)),
            with_payload=edge.PayloadSelector.Exclude([THUMBNAIL]),
            params=edge.SearchParams(exact=True),
        )
        found = {dict(point.payload or {})["path"]: point for point in shard.query(request)}
        wanted = {hit.id: hit for hit in local.search(QUERY, 100, where)}
        assert {id: point.payload for id, point in found.items()} == {
            id: hit.metadata for id, hit in wanted.items()
        }
        np.testing.assert_allclose(
            [found[id].score for id in wanted], [hit.score for hit in wanted.values()], atol=1e-5
        )
    shard.close()
