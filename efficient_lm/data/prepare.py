"""Turn text into a token directory that `config.data.source = "prepared"` reads.

    python -m efficient_lm.data.prepare notes/ 'more/*.jsonl.gz' --out data_cache/mine --tokenizer bpe:8192
    python -m efficient_lm.data.prepare --corpus gcide --out data_cache/gcide
    python -m efficient_lm.data.prepare --corpus rfc-informational rfc-std gcide --out data_cache/english
    python -m efficient_lm.data.prepare --verify data_cache/gcide

A file is a document, unless it is JSON lines (a line is a document) or --separator cuts it. Which documents are held
out for validation is decided when training, by document (see efficient_lm/data/store.py), so a corpus needs at least
two documents. The directory appears whole at the end; a failed or interrupted run leaves nothing behind.
"""

import argparse
import pathlib
import signal
import sys
import tempfile

from tqdm import tqdm

from efficient_lm.data import recipes
from efficient_lm.data.corpus import Corpus, train_corpus_bpe
from efficient_lm.data.store import open_store, write
from efficient_lm.data.text_files import find_files, read_documents
from efficient_lm.data.tokenization import bpe_size, load_tokenizer
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command


def parser() -> Parser:
    p = Parser(
        prog="python -m efficient_lm.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = "\n".join(f"{name}: {recipe.what}" for name, recipe in recipes.DEBIAN.items())
    p.epilog = f"corpora fetched from Debian packages:\n{known}"
    p.add_argument("inputs", nargs="*", help="text files, directories (recursive) or globs; also .gz, .jsonl")
    p.add_argument("--corpus", nargs="+", choices=recipes.NAMES, help="named corpora instead of files")
    p.add_argument("--out", help="directory to make")
    p.add_argument("--tokenizer", default="bytes", help="bytes (default), bpe:N (trained here), or a tokenizer.json")
    p.add_argument("--text-field", default="text", help="JSON lines: the field with the text (default: text)")
    p.add_argument("--separator", default="", help=r"cut files into documents at this string, for example '\n\n\n'")
    p.add_argument("--name", default="", help="name in the spec (default: the corpus, or the name of --out)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it is prepared data already")
    p.add_argument("--scratch", default=None, help="where a corpus is downloaded and unpacked (default: system temp)")
    p.add_argument("--verify", metavar="DIR", help="only check the sha256 of prepared data")
    return p


@command
def main(argv=None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch directories are removed
    args = parser().parse_args(argv)
    if args.verify:
        spec = open_store(args.verify, verify=True).spec
        print(f"{args.verify}: {spec['name']}, {spec['n_tokens']:,} tokens, sha256 as in spec.json")
    else:
        _prepare(args)
    return 0


def _prepare(args):
    if bool(args.inputs) == bool(args.corpus):
        raise ConfigError("inputs: give text files or --corpus, one of the two")
    if not args.out:
        raise ConfigError("--out = '': must name the directory to make")
    out = pathlib.Path(args.out)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"--out = {args.out!r}: exists already; choose another or pass --overwrite")
    size = bpe_size(args.tokenizer)
    tokenizer = None if size else load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory(prefix="efficient_lm-", dir=args.scratch) as scratch:
        corpus = recipes.make(args.corpus, pathlib.Path(scratch), log=_say) if args.corpus else _files_corpus(args)
        if size:
            _say(f"training a byte-level BPE of {size} tokens")
            tokenizer = train_corpus_bpe(corpus, size)
        try:
            spec = write(
                out,
                _with_progress(corpus),
                tokenizer,
                name=args.name or corpus.name or out.name,
                about=corpus.about,
                overwrite=args.overwrite,
            )
        except FileExistsError:
            raise ConfigError(f"--out = {args.out!r}: exists and isn't prepared data; choose another") from None
    print(
        f"{out}: {spec['n_documents']:,} documents ({spec['n_duplicates_dropped']:,} duplicates dropped), "
        f"{spec['n_bytes']:,} bytes, {spec['n_tokens']:,} tokens of {spec['tokenizer']['name']} "
        f"({spec['bytes_per_token']:.3f} bytes per token)"
    )
    print(f"use: --config.data.source=prepared --config.data.path={out} --config.data.tokenizer={args.tokenizer}")


def _files_corpus(args) -> Corpus:
    files = find_files(args.inputs)
    separator = args.separator.encode().decode("unicode_escape")
    skipped = set()

    def skip(file):
        if file not in skipped:
            skipped.add(file)
            _say(f"skipping binary file {file}")

    def documents():
        return read_documents(files, text_field=args.text_field, separator=separator, on_binary=skip)

    about = {"what": "text files", "from": " ".join(args.inputs), "files": len(files), "licence": "not stated"}
    return Corpus(args.name, documents, about)


def _with_progress(corpus):
    with tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None) as bar:
        for document in corpus.documents():
            bar.update(len(document))
            yield document


def _say(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
