"""Write the Parquet files of a batch job from its shards.

Shape letters: n videos, T segments.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmran.categories import LABELS
from cmran.errors import StorageError
from cmran.evaluation.events import events_of
from cmran.utils.files import atomic_write
from serving.batch.job import EVENTS, SEGMENTS
from serving.batch.shards import Results, Shards, join

ROW_GROUP_VIDEOS = 8192
"""Videos per row group of the Parquet files; it bounds the memory of writing them."""


def write_parquet(
    out: Path, shards: Shards, video_ids: list[str] | None, categories: tuple[str, ...], *, keep: bool
) -> tuple[int, Results | None]:
    """Write segments.parquet and events.parquet.

    Args:
        out: Folder of the files.
        shards: The finished shards.
        video_ids: Ids of all videos of the data folder; `None` if they are unknown.
        categories: Names of the labels 0 to 27.
        keep: Whether to return the results too.

    Returns:
        The number of events, and all results if `keep` is true.

    Raises:
        StorageError: A shard was damaged since it was written, or a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = (*categories, LABELS[-1])
    segment_schema = pa.schema(
        [
            ("row", pa.int64()),
            ("video_id", pa.string()),
            ("segment", pa.int32()),
            ("label", pa.int32()),
            ("category", pa.string()),
            ("event_probability", pa.float32()),
            ("class_probability", pa.float32()),
        ]
    )
    event_schema = pa.schema(
        [
            ("row", pa.int64()),
            ("video_id", pa.string()),
            ("category", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("score", pa.float32()),
        ]
    )
    count = 0
    kept: list[Results] = []
    with (
        atomic_write(out / SEGMENTS) as segment_file,
        atomic_write(out / EVENTS) as event_file,
        pq.ParquetWriter(segment_file, segment_schema) as segment_writer,
        pq.ParquetWriter(event_file, event_schema) as event_writer,
    ):
        for group in _row_groups(shards):
            n, T = group.segments.shape
            labels = group.segments.ravel()
            ids = [None if video_ids is None else video_ids[row] for row in group.rows]
            columns: list[Any] = [
                np.repeat(group.rows, T),
                [video_id for video_id in ids for _ in range(T)],
                np.tile(np.arange(T, dtype=np.int32), n),
                labels.astype(np.int32),
                [names[label] for label in labels],
                group.event_probability.ravel(),
                np.repeat(group.class_probability, T),
            ]
            segment_writer.write_table(_table(columns, segment_schema), row_group_size=n * T)
            class_probability = np.broadcast_to(group.class_probability[:, None], (n, T))
            # Events carry the index within the group, which also finds the id.
            events = events_of(range(n), group.segments, group.event_probability, class_probability)
            columns = [
                [int(group.rows[event.row]) for event in events],
                [ids[event.row] for event in events],
                [names[event.category] for event in events],
                [event.start_s for event in events],
                [event.end_s for event in events],
                np.array([event.score for event in events], np.float32),
            ]
            event_writer.write_table(_table(columns, event_schema), row_group_size=max(1, len(events)))
            count += len(events)
            if keep:
                kept.append(group)
    return count, join(kept) if keep else None


def _row_groups(shards: Shards) -> Iterator[Results]:
    """Yield the results in order, about ROW_GROUP_VIDEOS at a time."""
    group: list[Results] = []
    for number in range(len(shards.rows)):
        results = shards.read(number)
        if results is None:
            raise StorageError(
                f"shard {number} of the job was damaged while the job ran", hint="run it again with `resume=True`"
            )
        group.append(results)
        if sum(len(part.rows) for part in group) >= ROW_GROUP_VIDEOS:
            yield join(group)
            group = []
    if group:
        yield join(group)


def _table(columns: list[Any], schema: Any) -> Any:
    import pyarrow as pa

    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
