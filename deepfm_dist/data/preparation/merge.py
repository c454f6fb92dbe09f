"""One numbering of all ranks' texts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from deepfm_dist.data.codes import Codes, check_texts, hash_order, hash_texts
from deepfm_dist.data.jagged import Int32Array, grouped, offsets_of
from deepfm_dist.data.preparation.job import Job
from deepfm_dist.data.preparation.spill import Spill, read_spilled

CodeMaps = list[dict[str, Int32Array]]
"""By rank, for each vocabulary: new codes of the rank's own, and a last element -1 for no value."""


def unite(job: Job, codes: Mapping[str, Codes]) -> tuple[dict[str, pa.Array], CodeMaps]:
    """Numbers texts in the order of their hashes, whoever met them first. All ranks.

    Each text goes to the rank that its hash names, which strikes out repetitions; rank 0 puts
    in order what is left. All of it lies in files that the ranks map into memory: a rank holds
    its own texts and its share of all, rank 0 every distinct text of one vocabulary at a time.

    Args:
        job: the preparation.
        codes: this rank's texts by vocabulary, the same vocabularies on all ranks.

    Returns:
        The texts of each vocabulary by their new codes, and every rank's new codes.
    """
    ids: dict[str, pa.Array] = {}
    maps: CodeMaps = [{} for _ in range(job.crew.size)]
    for number, (name, of_rank) in enumerate(codes.items()):
        if job.crew.size == 1:
            ids[name], place = _ordered(of_rank.texts())
            maps[0][name] = np.append(place, np.int32(-1))
            continue
        ids[name], of_ranks = _merged(job, number, of_rank)
        for rank, code_map in enumerate(of_ranks):
            maps[rank][name] = code_map
    return ids, maps


def _merged(job: Job, number: int, codes: Codes) -> tuple[pa.Array, list[Int32Array]]:
    """One vocabulary of several ranks."""
    crew = job.crew
    ranks = range(crew.size)

    def path(*parts: str | int) -> Path:
        return job.spill("-".join(map(str, ("merge", number, *parts))))

    owner = (codes.hashes % np.uint64(crew.size)).astype(np.int32)
    dealt = Spill(path("texts", crew.rank), crew.size)
    dealt.add(pa.RecordBatch.from_arrays([codes.texts()], ["text"]), owner)
    dealt.close()
    places = crew.gather(dealt.places)
    union = Codes()
    for rank in ranks:
        batches = read_spilled(path("texts", rank), places[rank][crew.rank])
        found = [union.encode(batch["text"]) for batch in batches]
        np.save(path(rank, crew.rank, ".npy"), np.concatenate([np.zeros(0, np.int32), *found]))
    _write_texts(path("union", crew.rank), union.texts())
    starts = offsets_of(crew.gather(len(union)))
    if crew.is_first:
        unions = [_read_texts(path("union", q)) for q in ranks]
        check_texts(int(starts[-1]), sum(len(u.buffers()[2] or b"") for u in unions))
        ids, place = _ordered(pa.concat_arrays(unions))
        _write_texts(path("ids"), ids)
        np.save(path("place", ".npy"), place)
    crew.gather(None)
    place = np.load(path("place", ".npy"), mmap_mode="r")
    mine = np.full(len(codes) + 1, -1, np.int32)
    offsets, order = grouped(owner, crew.size)
    for q in ranks:
        of_owner = np.load(path(crew.rank, q, ".npy"))
        mine[order[offsets[q] : offsets[q + 1]]] = place[starts[q] + of_owner]
    np.save(path("map", crew.rank, ".npy"), mine)
    crew.gather(None)
    maps = [np.asarray(np.load(path("map", rank, ".npy"), mmap_mode="r")) for rank in ranks]
    return _read_texts(path("ids")), maps


def _ordered(texts: pa.Array) -> tuple[pa.Array, Int32Array]:
    """Texts in `hash_order`, and the place of each."""
    order = hash_order(texts, hash_texts(texts))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return texts.take(pa.array(order)), place


def _write_texts(path: Path, texts: pa.Array) -> None:
    batch = pa.RecordBatch.from_arrays([texts], ["text"])
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def _read_texts(path: Path) -> pa.Array:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)["text"]
