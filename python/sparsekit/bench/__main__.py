"""python -m sparsekit.bench <family> ...: each family's options with --help"""

import argparse
import importlib
import sys

FAMILIES = {  # a module of this package each
    "attention": "block-sparse attention on random lists per head",
    "stripes": "stripe-sparse attention on random columns, beside blocks of the same density",
    "recipes": "published recipes on a long prompt, everything included, beside dense causal attention",
    "matmul": "products with random block-sparse weights",
    "tokens": "gather, scatter, matching and merging of tokens",
    "selection": "scores, choices and lists beside torch's operators composed",
    "kv_cache": "decode attention over quantized caches",
}


def main(arguments: list[str] | None = None) -> int:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("sparsekit.bench needs rich: pip install 'sparsekit[bench]'")
    parser = argparse.ArgumentParser(prog="python -m sparsekit.bench", description=__doc__)
    parsers = parser.add_subparsers(dest="family", required=True)
    families = {}
    for name, what in FAMILIES.items():
        families[name] = importlib.import_module(f".{name}", __package__), parsers.add_parser(name, help=what)
        module, family_parser = families[name]
        module.add_arguments(family_parser)
    options = parser.parse_args(arguments)
    module, family_parser = families[options.family]
    return module.run(family_parser, options)


if __name__ == "__main__":
    sys.exit(main())
