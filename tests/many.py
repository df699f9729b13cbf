"""`diffkd` with files of a cache so small that many processes have some to make, for tests/forking.py."""

from diffkd import cli
from diffkd.data import shards


def main() -> None:
    shards.SHARD_BYTES = 1 << 13
    cli.main()
