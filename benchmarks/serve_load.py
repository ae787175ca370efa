"""Load test of serve.py: throughput relative to `generate`, time to first token, disconnections.

    $ python benchmarks/serve_load.py --out_dir=out-demo                       # about a minute
    $ python benchmarks/serve_load.py --out_dir=out-demo --churn=300           # five minutes more
    $ python benchmarks/serve_load.py --url=http://127.0.0.1:8001 --model=my-model --pid=4711

The server is pinned to one core and the clients to another. `generate` is measured on the server's
core, before and after, with a batch size equal to the number of streams. Prints JSON. With --churn,
clients disconnect at random for this many seconds: the server's memory must stay constant, all rows
must be freed, and requests with a fixed seed must return the same text.

With --url, the load goes to any server with OpenAI's completions, which is already running: each
stream requests three texts of equal length. With --pid, tokens are also counted per CPU second of
that process.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
PROMPTS = ["def main(", "class ", "import os\n", "    return ", "for i in ", '"""The ', "if not "]
GENERATE = """
import json, sys, time, torch
from brisk.interop.pretrained import read_pretrained
from model import GPT
streams, tokens, prompts = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
start = read_pretrained("resume", sys.argv[1])
model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
ids = [tokenizer.encode(prompts[i % len(prompts)]).tolist() for i in range(streams)]
for seed in range(3):
    begin = time.perf_counter(), time.process_time()
    model.generate(ids, tokens, seed=seed, vocab_size=tokenizer.vocab_size)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    print("rate", streams * tokens / wall, streams * tokens / cpu)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", default="out-demo")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="mean length of an answer")
    parser.add_argument("--seconds", type=float, default=30, help="duration of the load")
    parser.add_argument("--churn", type=float, default=0, help="duration of random disconnections")
    parser.add_argument("--cores", default="0,1", help="core of the server, core of the clients")
    parser.add_argument("--url", default="", help="another server: http://host:port")
    parser.add_argument("--model", default="", help="the model's name on that server")
    parser.add_argument("--pid", type=int, default=0, help="process of that server")
    args = parser.parse_args()
    if args.url:
        print(json.dumps(asyncio.run(measure_url(args))))
        return
    server_core, client_core = args.cores.split(",")
    before = generate_rate(args, server_core)
    server, port = start_server(args, server_core)
    try:
        os.sched_setaffinity(0, {int(client_core)})
        result = asyncio.run(measure(args, port, server.pid))
        if args.churn:
            result |= asyncio.run(churn(args, port, server.pid))
    finally:
        server.terminate()
        server.wait(20)
    os.sched_setaffinity(0, {int(server_core), int(client_core)})
    rates, cpu_rates = zip(*before, *generate_rate(args, server_core), strict=True)
    result["generate_tokens_per_second"] = round(median(rates), 1)
    result["generate_tokens_per_cpu_second"] = round(median(cpu_rates), 1)
    result["ratio"] = round(result["tokens_per_second"] / median(rates), 3)
    result["cpu_ratio"] = round(result["tokens_per_cpu_second"] / median(cpu_rates), 3)
    print(json.dumps(result))


def pinned(core, *command):
    return ["taskset", "-c", core, sys.executable, *map(str, command)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def generate_rate(args, core):
    """Measure `generate` on `core` three times: pairs (tokens/s, tokens/s of CPU time)."""
    numbers = (args.streams, args.tokens, json.dumps(PROMPTS))
    command = pinned(core, "-c", GENERATE, Path(args.out_dir).resolve(), *numbers)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return [tuple(map(float, pair)) for pair in re.findall(r"rate (\S+) (\S+)", done.stdout)]


def start_server(args, core):
    """Start serve.py on `core`. Returns the process and its port."""
    script = pinned(core, ROOT / "serve.py", args.out_dir, "--port=0")
    script.append(f"--max_batch={args.streams}")
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return process, int(found[1])
    sys.exit("the server did not start")


async def stream(port, body, leave_after=None, host="127.0.0.1", events=None):
    """Request a streamed completion on a new connection. Returns its text and the seconds to its
    first chunk. With `leave_after`, disconnects after this many chunks. The text is None then, and
    if the server is busy. Chunks are appended to the list `events`."""
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    begin, first, text = time.perf_counter(), None, ""
    writer.write(head.encode() + data)
    count = 0
    try:
        async for line in reader:
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                return None, None
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if events is not None:
                events.append(event)
            first = first or time.perf_counter() - begin
            count += 1
            if leave_after is not None and count > leave_after:
                return None, first
            text += event["choices"][0]["text"] if event["choices"] else ""
    finally:
        writer.transport.abort()  # disconnect without closing the stream
    return text, first


async def measure(args, port, pid):
    """Run `streams` clients that request texts of `tokens` tokens on average. Returns the total
    tokens/s after a warm-up, in which the clients get out of step, and the times to first token."""
    times, end = [], time.perf_counter() + args.seconds

    async def client(number):
        asked = random.Random(number)
        while time.perf_counter() < end:
            count = asked.randint(args.tokens // 2, 3 * args.tokens // 2)
            body = {"prompt": asked.choice(PROMPTS), "max_tokens": count}
            times.append((await stream(port, {**body, "seed": asked.randrange(2**31)}))[1])

    async def state():
        return (await get(port, "/health"))["tokens"], cpu_seconds(pid), time.perf_counter()

    clients = asyncio.gather(*(client(number) for number in range(args.streams)))
    await asyncio.sleep(0.2 * args.seconds)
    before = await state()
    await asyncio.sleep(0.8 * args.seconds)
    tokens, cpu, wall = (b - a for a, b in zip(before, await state(), strict=True))
    await clients
    refused, answered = times.count(None), sorted(filter(None, times))
    return {
        "streams": args.streams,
        "tokens": args.tokens,
        "refused": refused,
        "tokens_per_second": round(tokens / wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "first_token_median_ms": round(1000 * median(answered)),
        "first_token_p99_ms": round(1000 * answered[int(0.99 * (len(answered) - 1))]),
        "answers": len(answered),
    }


async def measure_url(args):
    """The same of the server at `--url`, for a fixed number of texts."""
    host, port = args.url.rpartition("/")[2].split(":")
    rounds, times, counts = 3, [], []

    async def client(number):
        asked = random.Random(number)
        for _ in range(rounds):
            body = {"model": args.model, "prompt": asked.choice(PROMPTS), "temperature": 1}
            body |= {"max_tokens": args.tokens, "seed": asked.randrange(2**31)}
            body["stream_options"] = {"include_usage": True}
            events = []
            _, first = await stream(int(port), body, host=host, events=events)
            times.append(first)
            usage = next((e["usage"] for e in events if e.get("usage")), {})
            counts.append(usage.get("completion_tokens", len(events)))

    begin, cpu = time.perf_counter(), cpu_seconds(args.pid) if args.pid else 0
    await asyncio.gather(*(client(number) for number in range(args.streams)))
    wall, times = time.perf_counter() - begin, sorted(times)
    result = {
        "streams": args.streams,
        "tokens": sum(counts),
        "tokens_per_second": round(sum(counts) / wall, 1),
        "first_token_median_ms": round(1000 * median(times)),
        "first_token_p99_ms": round(1000 * times[int(0.99 * (len(times) - 1))]),
    }
    if args.pid:
        result["tokens_per_cpu_second"] = round(sum(counts) / (cpu_seconds(args.pid) - cpu), 1)
    return result


async def churn(args, port, pid):
    """Run clients that disconnect at random, and others that compare their text."""
    asked = random.Random(0)
    fixed = [
        {"prompt": prompt, "max_tokens": 120, "seed": i, "temperature": 0.5 + i / 8}
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = [(await stream(port, body))[0] for body in fixed]
    end = time.perf_counter() + args.churn
    left = compared = wrong = 0
    memory = [resident(pid)]

    async def leaver():
        nonlocal left
        while time.perf_counter() < end:
            body = {"prompt": asked.choice(PROMPTS) * asked.choice([1, 1, 40]), "max_tokens": 1000}
            await stream(port, body, leave_after=asked.choice([0, 1, 2, 5, 20]))
            left += 1

    async def reader():
        nonlocal compared, wrong
        while time.perf_counter() < end:
            i = asked.randrange(len(fixed))
            text = (await stream(port, fixed[i]))[0]
            compared += 1
            wrong += text is not None and text != alone[i]

    async def watcher():
        while time.perf_counter() < end:
            await asyncio.sleep(min(5, args.churn / 4))
            memory.append(resident(pid))

    await asyncio.gather(*(leaver() for _ in range(60)), *(reader() for _ in range(4)), watcher())
    await asyncio.sleep(1)
    health = await get(port, "/health")
    return {
        "churn_seconds": args.churn,
        "left": left,
        "compared": compared,
        "texts_that_differ": wrong,
        "rows_in_use_afterwards": health["running"] + health["waiting"],
        "memory_mb": memory,
    }


async def get(port, path):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def cpu_seconds(pid):
    """CPU time of a process in seconds, which excludes other processes on the core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def resident(pid):
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


if __name__ == "__main__":
    main()
