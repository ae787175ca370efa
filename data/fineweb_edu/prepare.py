"""FineWeb-Edu's sample of 10 billion tokens in GPT-2's: what to train GPT-2 on today.

    $ python data/fineweb_edu/prepare.py
    $ python data/fineweb_edu/prepare.py --shards=2                  # the first two files of it

Its files, about 2 GB each, are downloaded and tokenized one after another, and the download
deleted. What is done stays done: the same command goes on after a stop, and more shards add to it.

Penedo et al. 2024, The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import join_datasets, write_dataset
from brisk.data.documents import Picked, find_files
from brisk.data.hub import download_from_hub, files_on_hub
from brisk.data.parquet_file import ParquetFile
from brisk.data.tables import Column
from brisk.errors import UserError, one_line_errors
from configurator import NonNegativeInt, configure

REPOSITORY, FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT/"


@dataclass(frozen=True)
class PrepareConfig:
    source: str = ""  # parquet files of your own (a folder or a pattern), instead of the hub's
    shards: NonNegativeInt = 0  # how many of the files; all if 0
    val_share: Annotated[float, (0.00001, 0.5)] = 0.001  # share of the documents for validation
    data_dir: str = ""  # where to write; beside this script if empty
    num_proc: NonNegativeInt = 0  # processes that tokenize; one for each core if 0


def write_shard(folder, file, config):
    """Tokenize the documents of one file; which are for validation depends on their text alone."""
    rows, bound = Column(ParquetFile(file), "text"), int(config.val_share * 2**64)
    splits = {
        "train": Picked(rows, lambda key: key >= bound),
        "val": Picked(rows, lambda key: key < bound),
    }
    write_dataset(folder, gpt2(), splits, Path(file).name, True, config.num_proc)


def main(config):
    directory = Path(config.data_dir or Path(__file__).parent)
    files = find_files(config.source) if config.source else files_on_hub(REPOSITORY, FOLDER)
    files = files[: config.shards or None]
    folders = [directory / "shards" / Path(file).stem for file in files]
    if not files or len(set(folders)) != len(files):
        raise UserError("there should be one file or more, each with a name of its own")
    for number, (file, folder) in enumerate(zip(files, folders, strict=True), start=1):
        if (folder / "val.bin").exists():  # it is the last to be put there
            print(f"{folder} is there already")
            continue
        print(f"file {number} of {len(files)}: {file}")
        if config.source:
            write_shard(folder, file, config)
        else:
            path = download_from_hub(REPOSITORY, file, directory / "download")
            write_shard(folder, path, config)
            path.unlink()
    join_datasets(directory, folders, f"{len(files)} files of FineWeb-Edu, sample-10BT")
    print(f"{directory / 'shards'} is no longer needed, unless to add more files to it")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
