r"""Serve a checkpoint: an OpenAI-compatible API, and a page that shows token probabilities.

    $ python serve.py out-shakespeare-char
    $ python serve.py --init_from=gpt2 --host=0.0.0.0 --api_key=$(openssl rand -hex 16)
    $ curl localhost:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"prompt": "ROMEO:", "max_tokens": 100, "seed": 1}'
"""

import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from brisk.data.tokenizer import knows_documents
from brisk.device import open_device
from brisk.errors import UserError, one_line_errors
from brisk.generation.kv_cache import rows_that_fit
from brisk.generation.prompt import drawable
from brisk.interop.pretrained import read_pretrained
from brisk.serving.completions import Served
from brisk.serving.scheduler import Engine
from configurator import NonNegativeInt, configure
from model import GPT

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeConfig:
    # model
    init_from: str = "resume"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, a file
    out_dir: str = "out"  # run to load with init_from=resume: its ckpt.pt, else last.pt
    # access
    host: str = "127.0.0.1"  # an address that other machines can reach needs api_key
    port: Annotated[int, (0, 65535)] = 8000  # 0: any free port
    api_key: str = ""  # key that clients must send; empty: none
    # limits
    max_batch: Annotated[int, (1, 256)] = 64  # samples in a batch; a power of two
    queue: NonNegativeInt = 256  # waiting samples; more get status 429
    max_tokens: Annotated[int, (1, 2**16)] = 4096  # largest max_tokens of a request
    # hardware
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of autocast
    given: tuple = field(default=(), compare=False)  # names of the keys that were set, in order


def main(config):
    if config.host not in LOOPBACK and not config.api_key:
        raise UserError(f"--host={config.host} lets other machines in: give --api_key too")
    try:
        from brisk.serving.api import make_app
        from brisk.serving.http import Server
    except ImportError as error:
        raise UserError(f"{error}; serve.py needs: pip install starlette uvicorn") from error
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:  # before loading the model
        bound = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        where = f"--host={config.host} --port={config.port}"
        raise UserError(f"{where}: {error.strerror}; --port=0 takes a free port") from error
    device = open_device(config.device, config.dtype)
    start = read_pretrained(config.init_from, config.out_dir)
    model, tokenizer = GPT.from_checkpoint(start.checkpoint).to(device.device), start.tokenizer
    documents = knows_documents(start.settings.get("rows"), tokenizer)
    rows = rows_that_fit(model.config, config.max_batch)
    engine = Engine(model, rows, config.queue, autocast=device.autocast, **drawable(tokenizer))
    served = Served(start.name, tokenizer, documents, rows, config.max_tokens)
    hosts = {*LOOPBACK, "[::1]"} if config.host in LOOPBACK else ()
    runs_dir = Path(config.out_dir).resolve().parent
    app = make_app(engine, served, runs_dir=runs_dir, api_key=config.api_key, hosts=hosts)
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{bound.getsockname()[1]}"
    print(f"{model.get_num_params() / 1e6:.2f}M parameters on {device}, {rows} requests at a time")
    print(f"page: {url}   API: {url}/v1, model {served.name}   (Ctrl-C stops)", flush=True)
    with suppress(KeyboardInterrupt):
        Server(app, engine).run(sockets=[bound])


if __name__ == "__main__":
    with one_line_errors():
        main(configure(ServeConfig, sys.argv[1:]))
