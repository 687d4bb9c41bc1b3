"""Speed and memory of sampling, SFT and the answer check, beside the libraries that one would use instead:

    python tests/bench.py                               # embedded student; a distilled one is made first, in out-bench/
    python tests/bench.py --model FOLDER --data data/svamp              # also a real checkpoint, on real questions
    python tests/bench.py sample sft                    # only these parts; the others: limits, run, students
    python tests/bench.py run --model FOLDER --data data/svamp          # the memory of a whole small run of train.py
    python tests/bench.py students                      # the paper's students on a GPU: memory and speed by the paper's preset

Every measurement is a process of its own. Ours and those of the peers that are installed (transformers, trl, peft) take
turns, --repeats times; what is printed are medians, with the least and the greatest. Where there is a batch size or
packing to choose, each is tried once, and the fastest is measured. Both sides get the same prompts or examples,
dtype, sampling settings, number of optimizer steps and setting of malloc. Run it on a machine that does nothing else.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data.answers import STRATEGIES, numeric_answer  # noqa: E402
from data.files import read_questions, read_rationales  # noqa: E402
from model import Config, Decoder  # noqa: E402
from sampler import Student, generate  # noqa: E402
from siked import filter_correct  # noqa: E402


def timed(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


# ----------------------------------------------------------------------------------------------------------------------
# Measured in a child process. A job is a dict that the parent made; what comes back is a dict of numbers.


def measure_limits(job):
    """What a matrix product, and reading memory, get out of this machine."""
    def rate(function, amount):
        function()
        return amount / statistics.median(timed(function)[0] for _ in range(7)) / 1e9

    def multiply(dtype):
        for size in (512, 2048):  # a processor that does not know the dtype would take minutes over the large one
            matrix = torch.randn(size, size).to(dtype)
            if (result := rate(lambda: matrix @ matrix, 2 * size ** 3)) < 10:
                break
        return result

    many = torch.ones(100_000_000)
    return {"float32 GFLOP/s": multiply(torch.float32), "bfloat16 GFLOP/s": multiply(torch.bfloat16),
            "GB/s": rate(many.sum, 4e8)}


def count_work(config, model, states: int, logits: int, pairs: int, passes: int = 1):
    """Floating-point operations that cannot be left out, in units of 1e9.

    states      tokens that go through the layers            pairs   (query, key) pairs, summed over the texts
    logits      of these, how many need the output layer     passes  1: forward; 2: and the gradient by the input of a
                                                                     matrix product; 3: also that by its weights
    """
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # q k^T, and times v
    return 2 * passes * (states * matrices + logits * config.vocab_size * config.hidden_size + pairs * attention) / 1e9


def read_items(job):
    """The prompts or examples: token ids that the parent wrote, so that a peer's process holds no model of ours."""
    return json.loads(Path(job["items"]).read_text())


def measure_sampling(job):
    prompts, student = [tuple(item) for item in read_items(job)], Student(job["model"])
    model, how = student.model.cast(getattr(torch, job["dtype"])), dict(
        n=job["n"], temperature=job["temperature"], top_p=0.95, batch_size=job["batch"], stop_ids=job["stops"])
    generate(model, prompts[:3], max_new_tokens=4, **how)  # warm-up
    seconds, samples = timed(lambda: generate(model, prompts, max_new_tokens=job["tokens"], **how))
    # Of the prompts of a question, which differ in their tags, one is counted whole; and of the cache, each key and value
    # once per query, with the weights once per step of a full batch.
    lengths = [len(stem + tail) for stem, tail in prompts]
    texts = [(lengths[i], min(len(ids) + 1, job["tokens"])) for i, row in enumerate(samples) for ids in row]
    n_tokens, fed = sum(count for _, count in texts), sum(lengths[::3])
    pairs = sum(count * length + count * (count + 1) // 2 for length, count in texts)
    config, size = model.config, model.model.norm.weight.element_size()
    gigabytes = size / 1e9 * (n_tokens / min(job["batch"], len(texts)) * sum(p.numel() for p in model.parameters())
                              + pairs * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim)
    texts = [(STRATEGIES[i % 3], student.tokenizer.decode(ids)) for i, row in enumerate(samples) for ids in row]
    check_seconds, _ = timed(lambda: [numeric_answer(strategy, text) for strategy, text in texts])
    return {"seconds": seconds, "items": len(texts), "check seconds": check_seconds, "tokens": n_tokens,
            "GFLOP": count_work(config, model, n_tokens + fed, n_tokens, pairs), "GB": gigabytes}


def measure_transformers_sampling(job):
    from transformers import AutoModelForCausalLM, GenerationConfig
    prompts, stops = sorted((stem + tail for stem, tail in read_items(job)), key=len), job["stops"] or [-1]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    sampled = {"temperature": job["temperature"], "top_p": 0.95, "top_k": 0} if job["temperature"] else {}
    how = dict(max_new_tokens=job["tokens"], eos_token_id=stops, pad_token_id=0, do_sample=bool(sampled),
               repetition_penalty=1.0, num_return_sequences=job["n"], **sampled)

    def run(prompts):
        n_tokens, at_once = 0, max(1, job["batch"] // job["n"])
        for start in range(0, len(prompts), at_once):
            part = prompts[start:start + at_once]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])  # padded on the left, as it has to be there
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            texts = model.generate(ids, attention_mask=mask, **how)[:, width:].tolist()
            n_tokens += sum(next((i + 1 for i, token in enumerate(text) if token in stops), len(text)) for text in texts)
        return n_tokens

    def run_continuously(prompts):
        outputs = model.generate_batch(prompts, generation_config=GenerationConfig(**how)).values()
        if len(outputs) != len(prompts) * job["n"] or any(output.error for output in outputs):
            raise RuntimeError(f"generate_batch: {len(outputs)} texts instead of {len(prompts) * job['n']}")
        return sum(len(output.generated_tokens) for output in outputs)

    function = run if job["batch"] else run_continuously
    with torch.inference_mode():
        function(prompts[:1])  # warm-up
        torch.manual_seed(0)
        seconds, n_tokens = timed(lambda: function(prompts))
    return {"seconds": seconds, "items": len(prompts) * job["n"], "tokens": n_tokens}


def measure_sft(job):
    examples, student = read_items(job), Student(job["model"])
    args = train.parse_args(["--batch-size", str(job["batch"]), "--accumulation", str(job["per step"] // job["batch"]),
                             "--lr", "1e-5", "--dtype", job["dtype"], "--lora", str(job["lora"]), "--device", "cpu"])
    steps = len(examples) // job["per step"]
    seconds, _ = timed(lambda: train.fine_tune(student, examples, steps, args, 0, "sft", None, student.folder))
    lengths = [(len(prompt) + len(target) - 1, len(target)) for prompt, target in examples]
    return {"seconds": seconds, "items": len(examples), "tokens": sum(length for length, _ in lengths), "GFLOP": count_work(
        student.model.config, student.model, *map(sum, zip(*lengths)), sum(length * (length + 1) // 2 for length, _ in lengths),
        passes=2 if job["lora"] else 3), "GB": 0}


def measure_run(job):
    """The peak of a whole run of train.py, and what it was after each training: does it grow from round to round?"""
    fine_tune, peaks = train.fine_tune, []

    def noted(*args, **keywords):
        fine_tune(*args, **keywords)
        peaks.append(peak_memory())

    train.fine_tune, sys.argv = noted, ["train.py", *job["arguments"]]
    seconds, _ = timed(train.main)
    return {"seconds": seconds, "peaks": peaks}


def measure_trl_sft(job):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    examples, low = read_items(job), job["dtype"] == "bfloat16"
    dataset = Dataset.from_list([{"input_ids": a + b, "completion_mask": [0] * len(a) + [1] * len(b)} for a, b in examples])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(job["model"] + "/tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(job["stops"][0])
    batch, accumulation = job["batch"], job["per step"] // job["batch"]
    if job["packing"]:  # as many packed sequences in a step as make the same number of steps
        n_packed = math.ceil(sum(len(a) + len(b) for a, b in examples) / 1024)
        batch, accumulation = max(1, round(n_packed * job["per step"] / len(examples))), 1
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16 if low and job["lora"] else torch.float32)
    lora = LoraConfig(r=job["lora"], lora_alpha=32, lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, train_dataset=dataset, processing_class=tokenizer, peft_config=lora if job["lora"] else None,
        args=SFTConfig(output_dir=job["out"], per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                       num_train_epochs=1, learning_rate=1e-5, bf16=low, use_cpu=True, max_length=1024,
                       packing=job["packing"], train_sampling_strategy=job["order"], gradient_checkpointing=False,
                       completion_only_loss=True, optim="adamw_torch_fused", report_to="none", save_strategy="no",
                       logging_strategy="no", disable_tqdm=True))
    seconds, _ = timed(trainer.train)
    return {"seconds": seconds, "items": len(examples), "steps": trainer.state.global_step}


# {name: (config.json, rows)}: the sizes of the paper's students, and as many rows as an 80 GB card has room for
STUDENTS = {
    "Qwen2 0.5B": ({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}, 256),
    "Qwen2 1.5B": ({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
                    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}, 256),
    "SmolLM 1.7B": ({"model_type": "llama", "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 24, "num_attention_heads": 32}, 256),
    "Gemma 2B": ({"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
                  "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}, 256),
    "Gemma 7B": ({"model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
                  "num_hidden_layers": 28, "num_attention_heads": 16}, 32),
}


def measure_student(job):
    """With random weights and tokens: those change neither memory nor time."""
    device, rows, random_ids = train.parse_args([]).device, job["rows"], random.Random(0)

    def write(count):
        return [random_ids.randrange(job["config"]["vocab_size"]) for _ in range(count)]

    def measure(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed(lambda: (function(), torch.cuda.synchronize()))
        return seconds, torch.cuda.max_memory_allocated() / 1e9

    with torch.device(device):
        model = Decoder(Config(tie_word_embeddings=True, **job["config"]))
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)  # LoRA reads the frozen weights again from there
    examples, results = [(write(120), write(180)) for _ in range(64)], []
    for batch in (2, 8):
        args = train.parse_args(["--preset", "paper", "--dtype", "bfloat16", "--batch-size", str(batch),
                                 "--accumulation", str(8 // batch)])
        for steps in (1, 8):  # the first is a warm-up
            seconds, gigabytes = measure(lambda: train.fine_tune(
                SimpleNamespace(model=model), examples, steps, args, 0, "sft", weights_folder=folder.name))
        results += [f"{8 * steps / seconds:.0f} examples/s, {gigabytes:.1f} GB"]
    cast = model.cast(torch.bfloat16)  # both are there, as in a run
    prompts = [(question, write(3)) for question in [write(280) for _ in range(rows)] for _ in range(3)][:rows // 10]
    for new in (2, 512):
        seconds, gigabytes = measure(lambda: generate(
            cast, prompts, n=10, max_new_tokens=new, temperature=0.7, top_p=0.95, stop_ids=[], batch_size=rows))
    return {"text": f"SFT 2 x 4: {results[0]}; 8 x 1: {results[1]}; sampling in {rows} rows: "
                    f"{10 * len(prompts) * new / seconds:,.0f} tokens/s, {gigabytes:.1f} GB"}


def peak_memory() -> float:
    """GiB; of this process alone, while getrusage begins with what the parent had."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20 if status.exists() else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# The parent


# glibc then keeps freed memory, which saves the peers up to half of their time, and us a tenth.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 62)}


def run_child(name, timeout=None, malloc=KEEP_FREED_MEMORY, **job) -> dict:
    try:
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps({"name": name, **job})],
                              env=os.environ | malloc, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {timeout:.0f} s") from None
    if done.returncode < 0:  # its last line would be no reason
        raise RuntimeError(f"ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def describe(values) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def setting(job) -> dict:
    return {key: job[key] for key in ("batch", "packing", "order") if key in job}


def compare_all(repeats: int, limits: dict, title: str, unit: str, choices: dict) -> None:
    """Prints a line per contestant. choices: {label: [(function name, job), ...]}, "ours" first; the fastest job counts."""
    print(f"\n{title}", flush=True)
    contestants, patience = {}, None
    for label, jobs in choices.items():
        tried = []
        for name, job in jobs:
            try:
                tried.append((run_child(name, patience, **job)["seconds"], job))
                print(f"  tried: {label} {setting(job)}: {tried[-1][0]:.3g} s", flush=True)
            except RuntimeError as error:
                print(f"  tried: {label} {setting(job)}: {error}", flush=True)
        if tried:
            seconds, job = min(tried, key=lambda pair: pair[0])
            contestants[label] = name, job
            patience = patience or 10 * seconds + 60  # or the continuous batching of a CPU takes all day
    results = {label: [] for label in contestants}
    for _ in range(repeats):
        for label, (name, job) in contestants.items():
            results[label].append(run_child(name, **job))
    for label, of in results.items():
        line = f"  {label} {setting(contestants[label][1])}: {describe([r['items'] / r['seconds'] for r in of])} {unit}/s"
        if "tokens" in of[0]:
            line += f", {describe([r['tokens'] / r['seconds'] for r in of])} tokens/s"
        line += f", peak {describe([r['GiB'] for r in of])} GiB"
        if "GFLOP" in of[0]:  # the least time, over the time
            peak = limits[contestants[label][1]["dtype"] + " GFLOP/s"]
            line += f", {describe([100 * max(r['GFLOP'] / peak, r['GB'] / limits['GB/s']) / r['seconds'] for r in of])} % of the limit"
        if "check seconds" in of[0]:
            line += f", answer check {describe([100 * r['check seconds'] / r['seconds'] for r in of])} % of the time"
        if label != "ours":
            ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in zip(of, results["ours"])]
            line += f": ours is {describe(ratios)} times as fast"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("limits", "sample", "sft", "run")
    parser.add_argument("parts", nargs="*", default=parts, metavar="part", help=f"{', '.join(parts)}, students")
    parser.add_argument("--model", help="a real checkpoint, a folder")
    parser.add_argument("--data", default=str(ROOT / "data/toy"), help="for it: train.jsonl and teacher.jsonl")
    parser.add_argument("--questions", type=int, default=8, help="from it, that the checkpoint samples answers to [8]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        result = globals()[args.child.pop("name")](args.child)
        print(json.dumps(result | {"GiB": peak_memory()}))
        return
    if unknown := set(args.parts) - {*parts, "students"}:
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(parts)}, students")
    if "students" in args.parts:
        if not torch.cuda.is_available():
            parser.error("students: there is no GPU")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
        for name, (config, rows) in STUDENTS.items():
            print(f"{name}: {run_child('measure_student', config=config, rows=rows)['text']}", flush=True)
        if set(args.parts) == {"students"}:
            return
    has = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "trl", "peft", "datasets")}
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; peers: "
          + (", ".join(f"{name} {importlib.metadata.version(name)}" for name in has if has[name]) or "none is installed"))
    limits = run_child("measure_limits")
    print("limits: " + ", ".join(f"{value:.0f} {name}" for name, value in limits.items() if name != "GiB"))
    # Real checkpoints are measured in the dtype that one would choose: few processors multiply matrices in bfloat16.
    dtype = max(("bfloat16", "float32"), key=lambda name: limits[f"{name} GFLOP/s"])
    if set(args.parts) == {"limits"}:
        return

    out, toy = ROOT / "out-bench", str(ROOT / "data/toy")
    if not (out / "report.md").is_file():  # the student that ships has not learned to stop
        subprocess.run([sys.executable, ROOT / "train.py", "--iters", "0", "--out", out], check=True, stdout=subprocess.DEVNULL)
    embedded = str(out / "seed-0" / "combined")

    def write_items(model, data, n_questions=0, n_examples=0):
        student, questions = Student(model), read_questions(Path(data) / "train.jsonl")
        if n_questions:
            items = [student.prompt(q, s) for q in questions[:n_questions] for s in STRATEGIES]
        else:
            by_id = {q.id: q for q in questions}
            teacher = filter_correct(read_rationales(Path(data) / "teacher.jsonl", questions), questions)
            items = []
            for r in teacher[:n_examples]:
                stem, tail = student.prompt(by_id[r.id])
                items.append((stem + tail, student.target(r)))
        path = out / f"items-{Path(model).name}-{n_questions}-{n_examples}.json"
        path.write_text(json.dumps(items))
        return {"model": model, "items": str(path), "stops": student.stop_ids}

    compare = partial(compare_all, args.repeats, limits)

    def compare_sampling(title, ours_batch, their_batches, job):
        peers = {"transformers generate": [("measure_transformers_sampling", job | {"batch": b}) for b in their_batches],
                 "transformers generate_batch": [("measure_transformers_sampling", job | {"batch": 0})]}
        compare(title, "samples", {"ours": [("measure_sampling", job | {"batch": ours_batch})]} | (
            peers if has["transformers"] else {}))

    def compare_sft(title, ours_batches, job):
        job["out"] = str(out / "trl")
        peers = {"trl SFTTrainer": [("measure_trl_sft", job | {
            "batch": b, "packing": b == 1, "order": "random" if b == 1 else "group_by_length"})
            for b in (1, 2, 4, 8, 16) if b <= job["per step"]]}
        compare(title, "examples", {"ours": [("measure_sft", job | {"batch": b}) for b in ours_batches]} | (
            peers if all(has.values()) else {}))

    if "sample" in args.parts:
        compare_sampling("Sampling, embedded student, float32, 100 questions x 3 tags x 10, temperature 0.7", 256, (60, 120, 240),
                         write_items(embedded, toy, 100) | {"n": 10, "tokens": 200, "temperature": 0.7, "dtype": "float32"})
        for temperature, n in ((0.7, 4), (0.0, 1)) if args.model else ():
            compare_sampling(f"Sampling, {args.model}, {dtype}, {args.questions} questions x 3 tags x {n}, 64 tokens, "
                             f"temperature {temperature}", 96, (16, 96), write_items(args.model, args.data, args.questions) | {
                                 "n": n, "tokens": 64, "temperature": temperature, "dtype": dtype, "stops": []})
    if "sft" in args.parts:
        compare_sft("SFT, embedded student, float32, 800 examples, 16 a step", (4, 16), write_items(embedded, toy, 0, 800) | {
            "per step": 16, "dtype": "float32", "lora": 0})
        for title, lora in (("all weights", 0), ("LoRA 16", 16)) if args.model else ():
            compare_sft(f"SFT, {args.model}, {dtype}, {title}, 32 examples, 8 a step", (2, 4, 8), write_items(
                args.model, args.data, 0, 32) | {"per step": 8, "dtype": dtype, "lora": lora})
    if "run" in args.parts and args.model:
        print(f"\nA whole run: {args.model}, {dtype}, --preset svamp, 200 questions, one round")
        data = out / "data-200"
        data.mkdir(exist_ok=True)
        for name, count in (("train.jsonl", 200), ("test.jsonl", 40)):
            lines = (Path(args.data) / name).read_text(encoding="utf-8").splitlines()[:count]
            (data / name).write_text("\n".join(lines), encoding="utf-8")
        ids = {question.id for question in read_questions(data / "train.jsonl")}
        lines = (Path(args.data) / "teacher.jsonl").read_text(encoding="utf-8").splitlines()
        (data / "teacher.jsonl").write_text(
            "\n".join(line for line in lines if str(json.loads(line)["id"]) in ids), encoding="utf-8")
        for title, lora in (("all weights", 0), ("LoRA 16", 16)):
            run = out / f"run-{lora}"
            shutil.rmtree(run, ignore_errors=True)  # or it would go on with what is there
            result = run_child("measure_run", malloc={}, arguments=[
                "--preset", "svamp", "--dtype", dtype, "--lora", str(lora), "--iters", "1",
                "--model", args.model, "--data", str(data), "--out", str(run)])
            after = ", ".join(f"{peak:.2f}" for peak in result["peaks"])
            print(f"  {title}: {result['seconds'] / 60:.1f} min, peak {result['GiB']:.2f} GiB, after the trainings {after}",
                  flush=True)


if __name__ == "__main__":
    main()
