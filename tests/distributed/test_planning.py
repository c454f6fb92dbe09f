"""Plans for clusters that are not there: memory as it really is, traffic message by message."""

import contextlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepfm_dist import plan as command
from deepfm_dist.config import Config, load_config, resolve
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import TableSpec
from deepfm_dist.distributed.planning import Plan, sent_bytes
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import RESERVED, local_shards
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs.plan import plan
from deepfm_dist.report.tables import plan_table
from tests.ranks import run_ranks
from tests.steps import COPIES, SMALL, Run, config_of, on_two_machines

BILLION = {"user": 1_000_000_000, "item": 50_000_000, "genre": 18}
ALL_NAMED = "sharding.tables={user: {kind: row_wise}, item: {kind: table_wise, rank: 1}, "
ALL_NAMED += "genre: {kind: table_wise, rank: 0}}"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that lies in the current folder would be planned for."""
    monkeypatch.chdir(tmp_path)


def planned(config: Config, rows: dict[str, int], size: int, local: int, gib: float) -> Plan:
    return plan(config, rows, size, local, int(gib * GIB))


def said(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main(["--quiet", *arguments])
    return code, out.getvalue(), err.getvalue()


ROWS = [f"--rows={table}={n}" for table, n in BILLION.items()]


def test_a_billion_rows_over_64_gpus() -> None:
    actual = planned(config_of("trainer.batch_size=65536"), BILLION, 64, 8, 80)
    user, item, genre = actual.tables
    assert actual.fits
    assert (user.sharding, user.ranks) == ("table_row_wise", range(8))
    assert (item.sharding, item.ranks) == ("table_row_wise", range(8, 16))
    assert (genre.sharding, genre.ranks) == ("replicated", range(64))
    assert (user.weight_bytes, user.state_bytes) == (10**9 * 20 * 4, 10**9 * 4)  # 16 + 1 -> 20
    assert item.weight_bytes == 50_000_000 * 80
    copies = 18 * (80 + 4 + 80)  # weights, accumulators, gradients
    assert genre.weight_bytes + genre.state_bytes == copies
    assert sum(rank.table_bytes for rank in actual.ranks) == 64 * copies + sum(
        table.weight_bytes + table.state_bytes for table in (user, item)
    )
    assert actual.ranks[0].table_bytes == 10**9 // 8 * 84 + copies
    spread = planned(
        config_of("trainer.batch_size=65536", "sharding.kind=row_wise"), BILLION, 64, 8, 80
    )
    assert all(rank.table_bytes >= 10**9 // 64 * 84 for rank in spread.ranks)
    assert actual.seconds_sending < spread.seconds_sending / 4
    code, out, _ = said(*ROWS, "--world-size=64", "trainer.batch_size=65536")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    row = ["user", "1,000,000,000", "74.51", "GiB", "3.725", "GiB", "table_row_wise", "0-7"]
    assert row in [line[:8] for line in lines]
    assert f"fullest rank: {actual.fullest.total_bytes / GIB:.4g} GiB, {actual.share:.1%}" in out


@pytest.mark.parametrize("wanted", ["auto", "table_wise"])
def test_what_does_not_fit_is_reported_with_changes_that_help_and_no_more_than_needed(
    wanted: str,
) -> None:
    settings = ["model.embedding_dim=127", "optimizer.tables.name=adam"]
    settings += [f"sharding.kind={wanted}"]
    code, out, err = said(*ROWS, "--world-size=16", *settings)
    assert code == 2
    assert re.search(r"fullest rank: .* [GT]iB, [1-9]\d{2,3}\.\d% of the limit", out)
    [line] = err.splitlines()
    assert line.startswith("DoesNotFit: does not fit 16 GPUs of 80 GiB; use --world-size ")
    remedies = line.partition("; use ")[2].split("; or ")
    assert len(remedies) == 3
    for remedy in remedies:
        asked = remedy.replace("size ", "size=").split()
        assert said(*ROWS, "--world-size=16", *settings, *asked)[0] == 0, remedy
    actual = re.match(r"--world-size (\d+).*model.embedding_dim=(\d+)", "".join(remedies))
    assert actual is not None
    size, width = map(int, actual.groups())
    settings.append("sharding.kind=row_wise")
    assert said(*ROWS, f"--world-size={size - 8}", *settings)[0] == 2
    assert said(*ROWS, "--world-size=16", *settings, f"model.embedding_dim={width + 4}")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=64", "sharding.tables={user: {kind: table_wise}}"],
         r"use no sharding.tables \(user\); or model.embedding_dim=15 sharding.kind=row_wise$"),
        (["--world-size=64", "sharding.kind=table_wise", "model.embedding_dim=120"],
         "use sharding.kind=row_wise"),
        (["--world-size=8", "--hbm-gib=0.5", "trainer.batch_size=4000000", "--rows=user=1000",
          "--rows=item=1000"], "use trainer.batch_size=500000$"),
        (["--world-size=1", "--hbm-gib=0.001"], "1 GPU of 0.001 GiB; use more and larger GPUs"),
    ],
)  # fmt: skip
def test_the_cause_is_what_is_to_be_changed(arguments: list[str], message: str) -> None:
    code, _, err = said(*ROWS, *arguments)
    assert code == 2
    assert re.search(message, err.strip()), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=0"], "ConfigError: --world-size 0 "),
        (["--world-size=12"], "as many GPUs on every machine"),
        (["--world-size=2", "--hbm-gib=0"], "positive numbers are needed"),
        (["--world-size=2", "--rows=user=-1"], "--rows user=-1: give TABLE=N, such as user=1_000"),
        (["--world-size=2", "--rows=users=1"], "--rows users: unknown table; available: user, it"),
        (["--world-size=2", "--rows=user"], "--rows user: give TABLE=N"),
        (["--world-size=2", "run.prepared_root=/nowhere"], "rows of the table user are not known"),
    ],
)
def test_bad_arguments_are_reported(arguments: list[str], message: str) -> None:
    code, out, err = said(*arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert re.search(message, line)


def test_rows_come_from_the_prepared_dataset(sample: PreparedDataset) -> None:
    where = f"run={{name: {sample.folder.name}, prepared_root: {sample.folder.parent}}}"
    actual = planned(config_of(where), {"item": 5}, 2, 2, 80)
    assert [table.rows for table in actual.tables] == [701, 5, 19]


def test_what_training_would_choose_from_the_data_is_planned_for(
    sample: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("../../configs/sample", [f"run.prepared_root={tmp_path}"])
    rows = {f.table_name: 50 for f in config.data.features}
    assert planned(config, rows, 1, 1, 80).tables[0].weight_bytes == 50 * (16 + 4) * 4
    assert "model.embedding_dim=16, trainer.batch_size=8192" in caplog.text
    tables = {f.table_name: TableSpec(rows=50, features=(f.name,)) for f in config.data.features}
    prepared = sample.manifest.model_copy(update={"data": config.data, "tables": tables})
    config.prepared_dir.mkdir()
    (config.prepared_dir / "manifest.json").write_text(prepared.model_dump_json())
    chosen, _ = resolve(config, prepared)
    assert chosen.optimizer.tables.name == "adam"
    width = -(-(chosen.model.embedding_dim + 1) // 4) * 4
    actual = planned(config, rows, 1, 1, 80)
    assert {table.weight_bytes for table in actual.tables} == {50 * width * 4}


def test_a_start_at_the_mean_label_needs_no_labels() -> None:
    """The default of click logs."""
    where, rows = "run.prepared_root=/nowhere", {"user": 50, "item": 5, "genre": 3}
    plans = [
        planned(config_of(where, f"model.init_at_mean={start}"), rows, 2, 2, 80)
        for start in ("true", "false")
    ]
    assert plan_table(plans[0]) == plan_table(plans[1])


def test_hashed_tables_and_buckets_need_no_data() -> None:
    fields = "data.features=[{name: h, hash_rows: 90}, {name: n, kind: numeric, "
    fields += "transform: bucket, buckets: 7}, "
    fields += "{name: x, entity: item, kind: vector, file: x.parquet, dim: 9}]"
    actual = planned(config_of(fields, "run.prepared_root=/nowhere"), {}, 2, 2, 80)
    assert {table.table: table.rows for table in actual.tables} == {"h": 91, "n": 8}
    longer = config_of(fields.replace("dim: 9", "dim: 79"), "run.prepared_root=/nowhere")
    more = planned(longer, {}, 2, 2, 80).ranks[0].buffer_bytes - actual.ranks[0].buffer_bytes
    assert more == 3 * 4 * 70 * longer.trainer.batch_size // 2  # half of three batches
    unknown = config_of(fields.replace(", dim: 9", ""), "run.prepared_root=/nowhere")
    with pytest.raises(ConfigError, match="the length of the vectors of x is not known: set dim"):
        planned(unknown, {}, 2, 2, 80)


def _bytes_held(folder: Path, config: Config) -> int:
    """Weights, optimizer state and dense gradients of this rank's pieces of the tables."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, 2)
        held = [piece for *_, piece in local_shards(run.sharded)]
        for name, values in run.optimizer.state_dict()["state"].items():
            if ".ebc." in name:
                held += [piece for value in values.values() for piece in _local(value)]
        # Tables that are updated in backward have no gradient of every row.
        tables = [p for k, p in run.sharded.named_parameters() if ".ebc." in k]
        held += [p.grad for p in tables if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in held)


def _local(value: Any) -> list[torch.Tensor]:
    if value.dim() == 0:
        return []  # a step count
    return value.to_local().local_shards() if hasattr(value, "to_local") else [value]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("rowwise_adagrad", "fp32"),
        ("rowwise_adagrad", "fp16"),
        ("adagrad", "fp32"),
        ("adagrad", "fp16"),
        ("sgd", "fp32"),
        ("adam", "fp32"),
    ],
)
@pytest.mark.parametrize(
    "where", ["sharding.kind=row_wise", "sharding.kind=table_wise", ALL_NAMED, COPIES]
)
def test_ranks_hold_as_many_bytes_as_planned(
    sample: PreparedDataset, name: str, precision: str, where: str
) -> None:
    settings = (f"optimizer.tables.name={name}", where, "model.embedding_dim=10")
    settings += (f"trainer.table_precision={precision}",)
    held = run_ranks(_bytes_held, 2, sample.folder, config_of(*settings))
    rows = {name: spec.rows for name, spec in sample.manifest.tables.items()}
    actual = planned(config_of(*settings), rows, 2, 2, 80)
    assert [rank.table_bytes for rank in actual.ranks] == held


@pytest.mark.parametrize(("float_kind", "float_bytes"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("kind", ["row_wise", "table_wise"])
def test_traffic_is_the_sum_of_all_messages(kind: str, float_kind: str, float_bytes: int) -> None:
    size, batch, width = 4, 64, 12
    sharding = f"sharding={{kind: {kind}, communication: {float_kind}}}"
    config = config_of(sharding, "model.embedding_dim=10", "trainer.batch_size=64")
    actual = planned(config, {"user": 100, "item": 100, "genre": 100}, size, 2, 80)
    sent, local = [0] * size, batch // size
    traffic = []
    for turn in range(3):  # tables
        before = sum(sent)
        holders = range(size) if kind == "row_wise" else [turn]
        for a in range(size):
            for b in range(size):
                if a == b:
                    continue
                if b in holders:
                    # Ids to the rank that has the row, evenly; lengths, if the rank does not know
                    # that they are 1; the gradient of a's rows.
                    lengths = local * 4 if kind == "row_wise" or turn == 2 else 0
                    sent[a] += local * 4 // len(holders) + lengths + local * width * float_bytes
                if a in holders:
                    sent[a] += local * width * float_bytes  # pooled rows of b, or a's part of them
        traffic.append(sum(sent) - before)
    assert [table.traffic_bytes for table in actual.tables] == traffic
    arch = actual.job.task.model.interaction_arch
    reduced = 2 * 3 * sum(p.numel() for p in arch.parameters()) * 4 // 4  # ring: 2 (W-1)/W
    assert [rank.sent_bytes - reduced for rank in actual.ranks] == sent
    # Two of three others are on the other machine of two ranks.
    seconds = max(r.sent_bytes for r in actual.ranks) * (2 / 3 / 12.5 + 1 / 3 / 600) / GIB
    assert actual.seconds_sending == pytest.approx(seconds)


def test_the_over_arch_and_the_buffers_count() -> None:
    small, wide = (
        planned(config_of(f"model.over_arch_layer_sizes={layers}"), BILLION, 64, 8, 80)
        for layers in ("[8]", "[800, 8]")
    )
    linears = [m for m in wide.job.task.modules() if isinstance(m, nn.Linear)]
    n = sum(p.numel() for m in linears for p in m.parameters()) + 1
    assert n == 48 * 800 + 800 + 800 * 8 + 8 + 8 + 1 + 1
    ends = 48 + 800 + 800 + 8 + 8 + 1
    assert wide.ranks[0].dense_bytes == 4 * (5 * n + 2 * 2048 // 64 * ends)
    assert small.ranks[0].dense_bytes < wide.ranks[0].dense_bytes
    larger = planned(config_of("trainer.batch_size=20480"), BILLION, 64, 8, 80)
    base = planned(config_of(), BILLION, 64, 8, 80)
    assert larger.ranks[0].buffer_bytes == 10 * base.ranks[0].buffer_bytes


def test_a_plan_is_put_into_words() -> None:
    actual = planned(config_of("sharding.kind=row_wise"), BILLION, 64, 8, 80)
    table_lines, rank_lines, summary = plan_table(actual).split("\n\n")
    assert [line.split()[0] for line in table_lines.splitlines()] == [
        "table", "user", "item", "genre"
    ]  # fmt: skip
    # Neighbours that need the same share a line: all but the owner of the small table.
    [owner] = actual.tables[2].ranks
    shown = [line.split()[0] for line in rank_lines.splitlines()[1:]]
    assert 0 < owner < 63
    first = "0" if owner == 1 else f"0-{owner - 1}"
    assert shown == [first, str(owner), "63" if owner == 62 else f"{owner + 1}-63"]
    assert summary.splitlines() == [
        f"64 GPUs on 8 machines, 80 GiB each, {RESERVED:.0%} of it to stay free; rowwise_adagrad; "
        f"2,048 rows a step",
        f"fullest rank: {actual.fullest.total_bytes / GIB:.4g} GiB, {actual.share:.1%} of the "
        f"limit; about {actual.seconds_sending * 1000:.2f} ms of a step go to sending",
    ]
    alone = plan_table(planned(config_of(), {"user": 9, "item": 9, "genre": 9}, 1, 1, 0.5))
    assert "\n1 GPU on 1 machine, 512 MiB each, " in alone


def test_buffers_hold_three_batches_of_ids_and_one_of_rows() -> None:
    """By hand: 64 rows, 12 floats a row; ids of a batch in training, in exchange and in copy."""
    tables = "user: {kind: row_wise}, item: {kind: table_wise, rank: 0}, "
    tables += "genre: {kind: table_wise, rank: 0}"
    settings = (f"sharding.tables={{{tables}}}", "model.embedding_dim=10", "trainer.batch_size=64")
    actual = planned(config_of(*settings), {"user": 100, "item": 100, "genre": 100}, 2, 2, 80)
    rows = 2 * 64 * 12 * 4  # pooled rows and their gradient
    ids = 3 * 64 * (4 + 4)  # an id and a length each
    received = 3 * (rows + ids) // 2  # three tables, half of the batch
    cut = rows + ids // 2  # every rank pools all rows of a table that is cut, from half of the ids
    assert [rank.buffer_bytes for rank in actual.ranks] == [
        received + cut + 2 * (rows + ids),
        received + cut,
    ]
    assert actual.ranks[1].buffer_bytes == 18_432


def test_a_cached_table_takes_its_share_and_what_finds_its_rows() -> None:
    cached = "sharding.tables={user: {kind: row_wise, cached: 0.1}}"
    whole = planned(config_of("sharding.kind=row_wise"), BILLION, 8, 8, 80)
    actual = planned(config_of("sharding.kind=row_wise", cached), BILLION, 8, 8, 80)
    per_rank = 10**9 // 8
    # 20 floats and an accumulator a row; a tenth of the rows with 16 bytes more each, the
    # accumulator and a place for every row.
    saved = whole.ranks[0].table_bytes - actual.ranks[0].table_bytes
    assert saved == per_rank * 84 - round(per_rank * (0.1 * 96 + 4 + 4))
    assert (whole.tables[0].cached, actual.tables[0].cached) == (None, 0.1)
    code, out, _ = said(*ROWS, "--world-size=2", "--hbm-gib=80", cached)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][-2:] == ["cached", "network/step"]
    assert {line[0]: line[-3] for line in lines[1:4]} == {
        "user": "10%",
        "item": "all",
        "genre": "all",
    }


def test_adam_and_a_cached_table_do_not_go_together() -> None:
    cached = "sharding.tables={user: {cached: 0.1}}"
    code, _, err = said(*ROWS, "--world-size=8", cached, "optimizer.tables={name: adam, lr: 0.003}")
    assert code == 2
    assert "sharding.tables.user.cached=0.1: adam moves every row at every step" in err


EXCHANGES = ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")


def _messages_of_a_step(folder: Path, config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a step: as reported for all ranks, and as this rank sent them."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, 1)
        counted = {"ids": 0, "floats": 0}

        def counting(name: str) -> Any:
            exchange = getattr(dist, name)

            parameters = inspect.signature(exchange)

            def counts(*arguments: Any, **named: Any) -> Any:
                bound = parameters.bind(*arguments, **named).arguments
                given = bound["input_tensor" if "input_tensor" in bound else "input"]
                group = bound.get("group")
                rank, size = dist.get_rank(group), dist.get_world_size(group)
                mine = given.numel() / size  # which stays
                if name == "all_to_all_single" and bound.get("input_split_sizes"):
                    mine = bound["input_split_sizes"][rank] * given[:1].numel()
                elif name == "all_gather_into_tensor":
                    mine = given.numel() * (2 - size)
                kind = {torch.int32: "ids", torch.float32: "floats"}.get(given.dtype)
                if kind is not None:  # int64: how much is to come
                    counted[kind] += int((given.numel() - mine) * 4)
                return exchange(*arguments, **named)

            return counts

        for name in EXCHANGES:
            setattr(dist, name, counting(name))
        [batch] = run.batches.steps(2, 2)
        run.losses(2, 2)
        return sent_bytes(run.sharded, world, batch.sparse), counted


@pytest.mark.parametrize("where", ["sharding.kind=row_wise", "sharding.kind=table_wise", ALL_NAMED])
def test_reported_bytes_are_those_exchanged(sample: PreparedDataset, where: str) -> None:
    actual = run_ranks(_messages_of_a_step, 2, sample.folder, config_of(*SMALL, where))
    reported = [report for report, _ in actual]
    floats = sum(counted["floats"] for _, counted in actual)
    ids = sum(counted["ids"] for _, counted in actual)
    for of_rank in reported:
        assert of_rank["embeddings"] + of_rank["embedding_gradients"] == floats
        # Rows of a cut table are assumed to be spread evenly; genres come in any number.
        assert of_rank["ids"] == pytest.approx(ids, rel=0.05)


def test_bytes_within_and_between_machines_are_those_exchanged(sample: PreparedDataset) -> None:
    config = config_of(*SMALL, "sharding.kind=table_row_wise")
    actual = run_ranks(on_two_machines, 4, _messages_of_a_step, sample.folder, config)
    floats = sum(counted["floats"] for _, counted in actual)
    ids = sum(counted["ids"] for _, counted in actual)
    for reported, _ in actual:
        assert reported["embeddings"] + reported["embedding_gradients"] == floats
        assert reported["ids"] == pytest.approx(ids, rel=0.05)
    # Of 2048 rows, 3 fields and 12 floats: between two ranks that each have half of a pool, and
    # from the machine that has it to the other one; the same back.
    assert floats == 2 * (2048 + 2048 / 2) * 3 * 12 * 4
    rows = {name: spec.rows for name, spec in sample.manifest.tables.items()}
    at_a_time = config.trainer.batch_size
    plan = planned(config, rows, 4, 2, 80)
    assert [(table.sharding, list(table.ranks)) for table in plan.tables] == [
        ("table_row_wise", ranks) for ranks in ([0, 1], [2, 3], [0, 1])
    ]
    each = 4 * at_a_time * (1 / 2 + 1) * 3 / 2  # ids: half to each holder; lengths to both
    assert sum(table.traffic_bytes for table in plan.tables) == floats + 3 * each
    # Rank 0 has half of two tables: it halves the sums of 2048 rows, sends those of half of the
    # others' rows, gathers the gradients; ids go to rank 1, and of one table to ranks 2 and 3.
    row, at_home = 12 * 4, at_a_time // 4
    within = 2 * (2 * at_a_time / 2 * row + at_home * (4 / 2 + 4))
    between = 2 * at_a_time / 4 * row + at_home * row + at_home * 2 * (4 / 2 + 4)
    arch = plan.job.task.model.interaction_arch
    reduced = 2 * 3 * sum(p.numel() for p in arch.parameters()) * 4 // 4
    rank = plan.ranks[0]
    assert rank.sent_bytes - reduced == within + between
    assert rank.local_bytes - reduced / 3 == pytest.approx(within)


NOTEBOOK = {"user": 31_360, "item": 6_807, "genre": 18}


def test_copies_of_the_notebooks_tables_send_a_fifth() -> None:
    """10 factors and a weight take 12 floats: 38,185 rows of gradients, or 65,536 of each field."""
    common = ("model.embedding_dim=10", "trainer.batch_size=65536")
    cut, copied = (
        planned(config_of(*common, f"sharding.kind={kind}"), NOTEBOOK, 2, 2, 80)
        for kind in ("row_wise", "auto")
    )
    assert [table.sharding for table in copied.tables] == ["replicated"] * 3
    each_way = sum(table.traffic_bytes for table in copied.tables) / 2
    assert each_way == 38_185 * 12 * 4 == 1_832_880
    ids = 3 * (65_536 * 4 // 4 * 2 + 65_536 * 4 // 2 * 2)  # half of them, and all lengths
    pooled = sum(table.traffic_bytes for table in cut.tables) - ids
    assert pooled / 2 == 3 * 65_536 * 12 * 4 == 9_437_184


def test_bytes_of_copies_are_those_of_a_ring(sample: PreparedDataset) -> None:
    settings = (*SMALL, COPIES, "trainer.batch_size=64")
    reported, counted = run_ranks(_messages_of_a_step, 2, sample.folder, config_of(*settings))[0]
    rows = sum(table.rows for table in sample.manifest.tables.values())
    assert counted == {"ids": 0, "floats": 0}
    assert (reported["ids"], reported["embeddings"]) == (0, 0)
    assert reported["embedding_gradients"] == 2 * rows * 12 * 4


def test_a_plan_refuses_what_training_would() -> None:
    code, _, err = said(*ROWS, "--world-size=8", "optimizer.tables={name: sgd, l2: 0.1}")
    assert code == 2
    assert "optimizer.tables.l2=0.1: FBGEMM's sgd on cuda ignores it" in err
