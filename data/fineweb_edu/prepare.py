"""FineWeb-Edu's 10-billion-token sample with GPT-2's tokenizer: the modern data set for GPT-2.

    $ python data/fineweb_edu/prepare.py
    $ python data/fineweb_edu/prepare.py --shards=2                  # only the first two files

Downloads and tokenizes one file of about 2 GB at a time and then deletes it. The same command
continues after an interruption; a larger --shards adds files.

Penedo et al. 2024, The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import join_datasets, write_dataset
from brisk.data.documents import Filtered, find_files
from brisk.data.hub import download_from_hub, files_on_hub
from brisk.data.parquet_file import ParquetFile
from brisk.data.tables import Column
from brisk.errors import UserError, one_line_errors
from configurator import NonNegativeInt, configure

REPOSITORY, FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT/"


@dataclass(frozen=True)
class PrepareConfig:
    source: str = ""  # your own parquet files (a folder or a pattern) instead of the hub's
    shards: NonNegativeInt = 0  # number of files; 0: all
    val_share: Annotated[float, (0.00001, 0.5)] = 0.001  # fraction of the documents for validation
    data_dir: str = ""  # output folder; if empty, the folder of this script
    num_proc: NonNegativeInt = 0  # processes that tokenize; 0: one for each core


def write_shard(folder, file, config):
    """Tokenize one file. Documents are assigned to a split by a hash of their text."""
    rows, bound = Column(ParquetFile(file), "text"), int(config.val_share * 2**64)
    splits = {
        "train": Filtered(rows, lambda key: key >= bound),
        "val": Filtered(rows, lambda key: key < bound),
    }
    write_dataset(folder, gpt2(), splits, Path(file).name, True, config.num_proc)


def main(config):
    directory = Path(config.data_dir or Path(__file__).parent)
    files = find_files(config.source) if config.source else files_on_hub(REPOSITORY, FOLDER)
    files = files[: config.shards or None]
    folders = [directory / "shards" / Path(file).stem for file in files]
    if not files or len(set(folders)) != len(files):
        raise UserError("--source must have at least one file, and no two with the same name")
    for number, (file, folder) in enumerate(zip(files, folders, strict=True), start=1):
        if (folder / "val.bin").exists():  # moved there last, so the shard is complete
            print(f"{folder} exists already")
            continue
        print(f"file {number} of {len(files)}: {file}")
        if config.source:
            write_shard(folder, file, config)
        else:
            path = download_from_hub(REPOSITORY, file, directory / "download")
            write_shard(folder, path, config)
            path.unlink()
    join_datasets(directory, folders, f"{len(files)} files of FineWeb-Edu, sample-10BT")
    print(f"{directory / 'shards'} can be deleted; keep it to add more files later")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
