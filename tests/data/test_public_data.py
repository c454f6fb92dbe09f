"""Configurations of well-known data sets, on generated files of the published form."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from deepfm_dist.bundle import BUNDLE
from deepfm_dist.config import load_config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.local import prepare

N_USERS, N_ITEMS = 30, 40


class Prepared:
    """A configuration prepared from files in a folder."""

    def __init__(self, name: str, root: Path, *overrides: str) -> None:
        config = load_config(name, [f"data.root={root}", *overrides])
        self.folder = root / "prepared"
        self.manifest: Manifest = prepare(config.data, config.input_root, self.folder, seed=1)

    def values(self, entity: str, field: str) -> dict[str, list[str]]:
        """A field's values of each user or item as text, sorted; none where there is none."""
        texts = pq.read_table(self.folder / f"vocabulary/{field}.parquet")["id"].to_pylist()
        table = pq.read_table(self.folder / f"entities/{entity}.parquet", columns=["id", field])
        return {
            row["id"]: sorted(texts[r] for r in row[field] if r) for row in table.to_pylist()[1:]
        }

    def numbers(self, entity: str, field: str) -> dict[str, float]:
        """A numeric field's transformed value, or its bucket, of each user or item."""
        table = pq.read_table(self.folder / f"entities/{entity}.parquet", columns=["id", field])
        return {row["id"]: row[field] for row in table.to_pylist()[1:]}

    def ids(self, entity: str) -> set[str]:
        return set(pq.read_table(self.folder / f"entities/{entity}.parquet")["id"].to_pylist()[1:])

    def titles(self) -> dict[str, str]:
        rows = pq.read_table(self.folder / "entities/item.parquet", columns=["id", "title"])
        return {row["id"]: row["title"] for row in rows.to_pylist()[1:]}


def _pairs(n_per_user: int = 12) -> list[tuple[int, int]]:
    rng = np.random.default_rng(3)
    return [
        (user, int(item))
        for user in range(N_USERS)
        for item in rng.choice(N_ITEMS, n_per_user, replace=False)
    ]


def test_kuairec(tmp_path: Path) -> None:
    """Lists in cells, times that are missing, a test file of its own."""
    header = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
    pairs = _pairs()
    watched = {pair: 2.5 if (pair[0] + pair[1]) % 3 else 0.4 for pair in pairs}
    rows = {pair: f"{pair[0]},{pair[1]},9,5,2020-07-05 05:27:48.378,20200705.0,1593898069.378,{w}\n"
            for pair, w in watched.items()}  # fmt: skip
    small = [pair for pair in pairs if pair[0] < 5 and pair[1] % 2]
    text = header + "".join(row for pair, row in rows.items() if pair not in small)
    (tmp_path / "big_matrix.csv").write_text(text)
    text = header + "".join(f"{u},{i},9,5,,,,{watched[u, i]}\n" for u, i in small)
    (tmp_path / "small_matrix.csv").write_text(text)
    tags = {i: [27, 9][: 1 + i % 2] for i in range(N_ITEMS)}
    lines = [f'{i},"{t}"\n' if len(t) > 1 else f"{i},{t}\n" for i, t in tags.items()]
    (tmp_path / "item_categories.csv").write_text("video_id,feat\n" + "".join(lines))
    columns = ["user_id", "user_active_degree", "is_lowactive_period", "follow_user_num",
               "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
               "register_days_range", "onehot_feat0"]  # fmt: skip
    users = [f'{u},full_active,0,5,"(0,10]",0,0,61-90,{u % 2}\n' for u in range(N_USERS)]
    (tmp_path / "user_features.csv").write_text(",".join(columns) + "\n" + "".join(users))
    prepared = Prepared("kuairec", tmp_path)
    known = prepared.ids("item")
    assert prepared.values("item", "tag") == {str(i): sorted(map(str, tags[int(i)])) for i in known}
    ranges = prepared.values("user", "follow_user_num_range")
    assert ranges == {user: ["(0,10]"] for user in prepared.ids("user")}
    assert prepared.manifest.splits["test"].positives == sum(watched[p] >= 2 for p in small)


def test_amazon_reviews(tmp_path: Path) -> None:
    """Packed JSON lines, lists, members of objects, times in milliseconds."""
    reviews = [
        {"rating": 5.0 if (u + i) % 4 else 2.0, "title": "so, \"so\"", "text": "a\nb", "images": [],
         "asin": f"V{i}", "parent_asin": f"B{i:03}", "user_id": f"AE{u}", "helpful_vote": 0,
         "timestamp": 1588687728923 + n, "verified_purchase": True}
        for n, (u, i) in enumerate(_pairs())
    ]  # fmt: skip
    items = [
        {"main_category": "All Beauty" if i % 3 else None, "title": f"Item, {i}", "price": None,
         "average_rating": 4.8, "features": [], "videos": [], "store": "Howard" if i % 2 else None,
         "categories": ["Beauty", "Hair, Care"][: i % 3], "parent_asin": f"B{i:03}",
         "details": {"Brand": "Yes", "Size": "1"} if i % 2 else {}}
        for i in range(N_ITEMS)
    ]  # fmt: skip
    for name, objects in (("All_Beauty", reviews), ("meta_All_Beauty", items)):
        text = "".join(json.dumps(o) + "\n" for o in objects)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    prepared = Prepared("amazon_reviews", tmp_path)
    known = prepared.ids("item")
    by_id = {item["parent_asin"]: item for item in items}
    actual = prepared.values("item", "category")
    assert actual == {i: sorted(by_id[i]["categories"]) for i in known}
    expected = {i: [*by_id[i]["details"].values()][:1] for i in known}
    assert prepared.values("item", "brand") == expected
    expected = {i: [by_id[i]["store"]] if by_id[i]["store"] else [] for i in known}
    assert prepared.values("item", "store") == expected
    assert prepared.titles() == {i: by_id[i]["title"] for i in known}
    positives = sorted(r["timestamp"] for r in reviews if r["rating"] >= 4)
    splits = prepared.manifest.splits
    assert splits["train"].rows + splits["valid"].positives + splits["test"].positives == len(
        positives
    )


def test_yelp(tmp_path: Path) -> None:
    """An object per line, with objects in it that may be null, and lists written with commas."""
    reviews = [
        {"review_id": f"r{n}", "user_id": f"u_{u}", "business_id": f"b-{i}", "useful": 0,
         "stars": float(3 + (u + i) % 3), "funny": 0, "cool": 0, "text": "x, \"y\"",
         "date": f"2018-07-07 22:{n % 60:02}:11"}
        for n, (u, i) in enumerate(_pairs())
    ]  # fmt: skip
    prices = ["2", None, "None"]
    businesses = [
        {"business_id": f"b-{i}", "name": f"N {i}", "city": "Tucson", "state": "AZ", "stars": 4.5,
         "attributes": {"RestaurantsPriceRange2": prices[i % 3]} if i % 2 else None,
         "categories": "Doctors, Traditional Chinese Medicine" if i % 4 else None, "hours": None}
        for i in range(N_ITEMS)
    ]  # fmt: skip
    for name, objects in (("review", reviews), ("business", businesses)):
        text = "".join(json.dumps(o) + "\n" for o in objects)
        (tmp_path / f"yelp_academic_dataset_{name}.json").write_text(text)
    prepared = Prepared("yelp", tmp_path)
    known = prepared.ids("item")
    both = ["Doctors", "Traditional Chinese Medicine"]
    expected = {i: both if int(i[2:]) % 4 else [] for i in known}
    assert prepared.values("item", "category") == expected
    expected = {i: ["2"] if int(i[2:]) % 6 == 3 else [] for i in known}
    assert prepared.values("item", "price_range") == expected
    assert prepared.titles() == {i: f"N {i[2:]}" for i in known}


def test_book_crossing(tmp_path: Path) -> None:
    """Latin-1, semicolons, quotes written with a backslash, and a book with a cell too few."""

    def write(name: str, header: str, lines: list[str]) -> None:
        path = tmp_path / f"BX-{name}.csv"
        path.write_text("\r\n".join([header, *lines]) + "\r\n", encoding="latin-1")

    pairs = _pairs()
    rated = [f'"{u}";"{i:09}X";"{(u + i) % 11}"' for u, i in pairs]
    write("Book-Ratings", '"User-ID";"ISBN";"Book-Rating"', rated)
    header = ["ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher"]
    header += [f"Image-URL-{size}" for size in "SML"]
    titles = ['The \\"Book\\" & co', "Él;le", 'a\\";b']
    books = [
        f'"{i:09}X";"{titles[i % 3]}";"A. é";"{(0, 1999, 2001)[i % 3]}";"P";"s";"m";"l"'
        for i in range(N_ITEMS)
    ]
    books[7] = '"000000007X";"DK (Level 4)\\";M. T.\\"";"2000";"DK";"s";"m";"l"'
    write("Books", ";".join(f'"{name}"' for name in header), books)
    users = [f'"{u}";"nyc, new york, {"usa" if u % 2 else "n/a"}";{"NULL" if u % 3 else 30 + u}'
             for u in range(N_USERS)]  # fmt: skip
    write("Users", '"User-ID";"Location";"Age"', users)
    prepared = Prepared("book_crossing", tmp_path)
    known = prepared.ids("item")
    plain = [t.replace("\\", "") for t in titles]
    expected = {i: plain[int(i[:-1]) % 3] if int(i[:-1]) != 7 else None for i in known}
    assert prepared.titles() == expected
    expected_authors = {i: ["A. é"] if int(i[:-1]) != 7 else [] for i in known}
    assert prepared.values("item", "author") == expected_authors
    cities = ["new york", "nyc"]
    places = {u: cities + ["usa"] * (int(u) % 2) for u in prepared.ids("user")}
    assert prepared.values("user", "place") == places
    dropped = {k: n for k, n in prepared.manifest.dropped.items() if "wrong number" in k}
    assert [*dropped.values()] == [1]
    for user, bucket in prepared.numbers("user", "age").items():
        assert (bucket > 0) == (int(user) % 3 == 0)


def test_hm(tmp_path: Path) -> None:
    """Ids with leading zeros, ages that are missing, dates; the last rows are held out."""
    pairs = _pairs()
    rows = [f"2020-{1 + n % 12:02}-{1 + n % 28:02},{u:064x},{108775000 + i:010},0.0108,{1 + n % 2}"
            for n, (u, i) in enumerate(pairs)]  # fmt: skip
    header = "t_dat,customer_id,article_id,price,sales_channel_id"
    (tmp_path / "transactions_train.csv").write_text("\n".join([header, *rows]))
    header = ("article_id,product_code,prod_name,product_type_no,colour_group_code,department_no,"
              "section_no,detail_desc")  # fmt: skip
    rows = [f'{108775000 + i:010},0108775,Top {i},253,{i % 50:02},1676,16,"with ""narrow"" straps"'
            for i in range(N_ITEMS)]  # fmt: skip
    (tmp_path / "articles.csv").write_text("\n".join([header, *rows]))
    header = "customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code"
    rows = [f"{u:064x},1.0,,ACTIVE,NONE,{'' if u % 3 else 20 + u},52043ee2" for u in range(N_USERS)]
    (tmp_path / "customers.csv").write_text("\n".join([header, *rows]))
    prepared = Prepared("hm", tmp_path, "data.split.valid=0.1", "data.split.test=0.1")
    known = prepared.ids("item")
    assert {i[:4] for i in known} == {"0108"}
    assert prepared.titles() == {i: f"Top {int(i) - 108775000}" for i in known}
    expected = {i: [f"{(int(i) - 108775000) % 50:02}"] for i in known}
    assert prepared.values("item", "colour") == expected
    actual = {int(user, 16): age for user, age in prepared.numbers("user", "age").items()}
    assert {age for user, age in actual.items() if user % 3} == {0.0}
    known_ages = {20 + user: age for user, age in actual.items() if user % 3 == 0}
    slopes = np.diff([known_ages[a] for a in sorted(known_ages)]) / np.diff(sorted(known_ages))
    assert slopes.min() > 0
    assert np.allclose(slopes, slopes[0])


def _strong(name: str, root: Path, *overrides: str) -> dict[str, int]:
    """Users of each split of a configuration with few held-out users."""
    prepared = Prepared(name, root, "data.split.valid=3", "data.split.test=4", *overrides)
    actual = {}
    for split in ("train", "valid", "test"):
        parts = sorted((prepared.folder / split).glob("*.parquet"))
        users = [user for part in parts for user in pq.read_table(part)["user"].to_pylist()]
        actual[split] = len(set(users))
    assert 0 not in actual
    return actual


def test_movielens_20m_by_strong_generalization(tmp_path: Path) -> None:
    """A header, half stars, times; a user with four positives, and one without any."""
    lines = [f"{u},{i},{(i + u) % 2 + 3.5},1112486027\n" for u, i in _pairs(30)]
    positives = Counter(u for u, i in _pairs(30) if (i + u) % 2)
    lines += [f"98,{i},4.0,1112486027\n" for i in range(4)] + ["99,1,0.5,1112486027\n"]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    assert min(positives.values()) >= 5
    users = _strong("ml20m_strong", tmp_path)
    assert users == {"train": N_USERS - 7, "valid": 3, "test": 4}


def test_netflix_by_strong_generalization(tmp_path: Path) -> None:
    """Two files without a header, rewritten by the command at the top of the configuration."""
    by_item = sorted((i, u) for u, i in _pairs(20))
    for number, items in ((1, range(N_ITEMS // 2)), (2, range(N_ITEMS // 2, N_ITEMS))):
        text = "".join(
            f"{i}:\n" + "".join(f"{u},{4 + u % 2},2005-09-06\n" for j, u in by_item if j == i)
            for i in items
        )
        (tmp_path / f"combined_data_{number}.txt").write_text(text)
    _run_comment("netflix_strong", "awk", tmp_path)
    users = _strong("netflix_strong", tmp_path)
    assert users == {"train": N_USERS - 7, "valid": 3, "test": 4}


def test_the_million_songs_by_strong_generalization(tmp_path: Path) -> None:
    """Tabs, no header, long ids; songs of few users go, and then users with few songs."""
    lines = [f"{u:040x}\tSO{i:016}\t{1 + u % 5}\n" for u, i in _pairs(25)]
    lines += [f"{99:040x}\tSO{i:016}\t1\n" for i in range(19)]  # one song too few
    lines += [f"{98:040x}\tSO{i:016}\t1\n" for i in range(15)]  # five songs that nobody else has
    lines += [f"{98:040x}\tSORARE{i}\t1\n" for i in range(5)]
    (tmp_path / "train_triplets.txt").write_text("".join(lines))
    users = _strong("msd_strong", tmp_path, "data.interactions.min_rows_per_item=5")
    assert users == {"train": N_USERS - 7, "valid": 3, "test": 4}


def test_kkbox_x1(tmp_path: Path) -> None:
    """Words in a cell, and two columns that the command at the top of the configuration writes."""
    header = ("label,msno,song_id,source_system_tab,source_screen_name,source_type,city,gender,"
              "registered_via,language,genre_ids,artist_name,isrc,bd\n")  # fmt: skip
    ages = ["-43", "0", "1", "10", "11", "95", "96", "1051"]
    for split, n in (("train", 400), ("valid", 40), ("test", 40)):
        rows = (
            f"{k % 2},m{k % 5}=,s{k % 7}=,explore,Explore,online-playlist,{k % 3},"
            f"{'female' if k % 3 else ''},7,3.0,{'465 1609' if k % 2 else '465'},"
            f'"Jay, Chou {k % 4}",{["TWA471306001", "USUM71409733", ""][k % 3]},{ages[k % 8]}\n'
            for k in range(n)
        )
        (tmp_path / f"{split}.csv").write_text(header + "".join(rows))
    _run_comment("kkbox_x1", "pandas", tmp_path)
    prepared = Prepared("kkbox_x1", tmp_path)
    texts = {
        name: set(pq.read_table(prepared.folder / f"vocabulary/{name}.parquet")["id"].to_pylist())
        for name in prepared.manifest.tables
    }
    assert texts["age"] - {None} == {"1", "2", "7"}  # 1 and 10; 11; 95; those beyond have none
    assert texts["country"] - {None} == {"TW", "US"}
    assert texts["genre_ids"] - {None} == {"465", "1609"}
    assert texts["artist_name"] - {None} == {"Jay,", "Chou", "0", "1", "2", "3"}
    assert [spec.rows for spec in prepared.manifest.splits.values()] == [400, 40, 40]


def test_histories_in_cells_share_the_table_of_what_they_are_of(tmp_path: Path) -> None:
    """AmazonElectronics_x1 and TaobaoAd_x1: values joined by ^, or none; the test rows validate."""
    for split, n in (("train", 300), ("test", 30)):
        rows = [
            f"{k % 2},{k % 40},{k % 9},{k % 3},{'^'.join(map(str, range(20, 20 + k % 4)))},"
            f"{'^'.join(['7'] * (k % 4))}\n"
            for k in range(n)
        ]
        header = "label,user_id,item_id,cate_id,item_history,cate_history\n"
        (tmp_path / f"{split}.csv").write_text(header + "".join(rows))
    prepared = Prepared("amazonelectronics_x1", tmp_path)
    tables = prepared.manifest.tables
    assert {name: spec.rows - 1 for name, spec in tables.items()} == {"item_id": 12, "cate_id": 4}
    assert tables["item_id"].features == ("item_id", "item_history")
    assert prepared.manifest.entities == {"user": 41}
    header = ("clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,"
              "age_level,pvalue_level,shopping_level,occupation,new_user_class_level,adgroup_id,"
              "cate_id,campaign_id,customer,brand,price,pid,btag\n")  # fmt: skip
    for split, n in (("train", 300), ("test", 30)):
        rows = [
            f"{k % 2},{'^'.join(['1', '4'][: k % 3])},{'^'.join(['5', '6'][: k % 3])},,{k % 6},"
            f"1,2,1,3,2,3,0,{k % 5},{k % 11},{5 + k % 2},{k % 4},{k % 3},{k % 8},{k * 1.5},43,1\n"
            for k in range(n)
        ]
        (tmp_path / f"{split}.csv").write_text(header + "".join(rows))
    prepared = Prepared("taobaoad_x1", tmp_path)
    tables = prepared.manifest.tables
    assert {name: tables[name].rows - 1 for name in ("btag", "cate_id", "brand")} == {
        "btag": 2, "cate_id": 2, "brand": 8
    }  # fmt: skip
    assert tables["brand"].features == ("brand", "brand_his")
    assert [f.name for f in prepared.manifest.dense] == ["price"]


def _run_comment(name: str, word: str, folder: Path) -> None:
    """Types the command with a word in it that stands at the top of a configuration."""
    lines = (BUNDLE / f"configs/{name}.yaml").read_text().splitlines()
    command = next(line for line in lines if line.startswith("#   ") and word in line)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = command.removeprefix("#")
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, env=os.environ | {"PATH": path})
