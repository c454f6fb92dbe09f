"""Recommendations in files: one parquet part per rank, merged into parquet and CSV by rank 0."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from deepfm_dist.data.vocabulary import external
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DeepFMError
from deepfm_dist.ranking.ranker import Ranked


def write_recommendations(
    ranked: Iterator[Ranked], user_ids: pa.Array, item_ids: pa.Array, folder: Path, world: World
) -> tuple[Path, Path, int] | None:
    """Writes ``recommendations.parquet`` and ``recommendations.csv``. All ranks.

    The parquet file has ``user_id, item_id, score, rank`` (score: logit; rank from 1), the CSV
    file ``user,item``; both go by user, then rank. Neither appears before it is whole.

    Args:
        ranked: this rank's users.
        user_ids: ``[U]`` external ids of all users, in ranking order.
        item_ids: ``[I]`` external ids by position.
        folder: of the run.
        world: the ranks; the folder must be the same disk for all.

    Returns:
        On rank 0: both paths and the number of rows; None elsewhere.

    Raises:
        DeepFMError: the folder cannot be written.
    """
    aside = folder / ".recommendations.part"
    world.first_does("recommendations_begin", lambda: _emptied(aside))
    users, items = external(user_ids), external(item_ids)
    schema = pa.schema(
        [
            ("user_id", users.type),
            ("item_id", items.type),
            ("score", pa.float32()),
            ("rank", pa.int32()),
        ]
    )
    with pq.ParquetWriter(aside / f"{world.rank:05d}.parquet", schema) as writer:
        for begin, positions, scores in ranked:
            owner, rank = np.nonzero(positions >= 0)
            writer.write_batch(
                pa.record_batch(
                    [
                        users.take(pa.array(begin + owner)),
                        items.take(pa.array(positions[owner, rank])),
                        pa.array(scores[owner, rank]),
                        pa.array((rank + 1).astype(np.int32)),
                    ],
                    schema=schema,
                )
            )
    world.barrier()
    return world.first_does("recommendations_end", lambda: _merged(aside, folder, schema))


def _emptied(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise DeepFMError(f"{folder.parent}: cannot be written: {error.strerror}") from None


def _merged(aside: Path, folder: Path, schema: pa.Schema) -> tuple[Path, Path, int]:
    parquet, csv = aside / "recommendations.parquet", aside / "recommendations.csv"
    rows = 0
    submission = pa.schema([("user", schema.field(0).type), ("item", schema.field(1).type)])
    options = pa_csv.WriteOptions(include_header=False, quoting_style="needed")
    with (
        pq.ParquetWriter(parquet, schema, compression="zstd") as writer,
        csv.open("wb") as file,
    ):
        file.write(b"user,item\n")  # Arrow would put the names into quotes
        text = pa_csv.CSVWriter(file, submission, write_options=options)
        for batch in _rebatched(sorted(aside.glob("[0-9]*.parquet"))):
            writer.write_table(batch)
            text.write_table(batch.select(["user_id", "item_id"]).rename_columns(submission.names))
            rows += batch.num_rows
        text.close()
    for path in (parquet, csv):
        os.replace(path, folder / path.name)
    shutil.rmtree(aside)
    return folder / parquet.name, folder / csv.name, rows


def _rebatched(parts: list[Path], rows: int = 1 << 20) -> Iterator[pa.Table]:
    """All parts in tables of one size: the merged bytes do not depend on how users were dealt."""
    waiting: list[pa.Table] = []
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=rows):
            waiting.append(pa.Table.from_batches([batch]))
            while sum(t.num_rows for t in waiting) >= rows:
                table = pa.concat_tables(waiting).combine_chunks()
                yield table.slice(0, rows)
                waiting = [table.slice(rows)]
    table = pa.concat_tables(waiting).combine_chunks() if waiting else None
    if table is not None and table.num_rows:
        yield table
