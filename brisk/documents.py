"""Documents in files, compressed or not, or in a data set of the Hugging Face hub.

All of them are read by the `datasets` library, from disk and a few at a time, so that a corpus
may be larger than memory.
"""

import logging
from pathlib import Path

from brisk.corpus import cores
from brisk.errors import UserError

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_documents(source):
    """The `datasets.Dataset` of `source`: a set on the hub, a file, or a folder of files of one
    kind. A document is a line of .jsonl, a row of .parquet (its column `text`) or a whole .txt.

    Raises `UserError` where there are no documents to be had.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # told below, in one line
    try:
        from datasets import load_dataset

        dataset = load_dataset(**where_to_look(source), split="train")
    except UserError:
        raise
    except Exception as error:  # datasets and its file readers raise of every kind
        needs = "this needs the package datasets, and the network or files of yours, --source=PATH"
        raise UserError(f"no {source}: {error.__cause__ or error} ({needs})") from error
    if "text" not in dataset.column_names or len(dataset) == 0:
        raise UserError(f"{source} needs documents in a column named text")
    return dataset


def where_to_look(source):
    """The arguments of `load_dataset` that mean `source`."""
    if not Path(source).exists():
        if Path(source).suffix in LOADERS:
            raise UserError(f"there is no file {source}")
        return {"path": source, "num_proc": cores()}
    files = sorted(Path(source).rglob("*")) or [Path(source)]
    kinds = {str(file): LOADERS[end] for file in files for end in file.suffixes if end in LOADERS}
    if len(set(kinds.values())) != 1:
        raise UserError(f"{source} should have files of one kind of these: {', '.join(LOADERS)}")
    kind = next(iter(kinds.values()))
    options = {"sample_by": "document"} if kind == "text" else {}
    return {"path": kind, "data_files": list(kinds), **options}


class Texts:
    """The texts of a dataset in order, a thousand of them in memory at a time."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        for rows in self.dataset.iter(batch_size=1000):
            yield from rows["text"]
