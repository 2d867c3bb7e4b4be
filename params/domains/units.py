"""A domain of one's own, as an example: converting units. Two functions, no import of this project."""
import random
import re

FACTORS = {("km", "m"): 1000, ("m", "cm"): 100, ("h", "min"): 60, ("kg", "g"): 1000, ("day", "h"): 24, ("l", "ml"): 1000}


def rows(split, n, seed):
    """`n` different questions; those of "test" are even numbers and all others odd, so none is trained on."""
    rng = random.Random(f"{seed}/{split == 'test'}")
    asked = [(number, pair) for number in range(2 if split == "test" else 3, 400, 2) for pair in FACTORS]
    found = []
    for number, (big, small) in rng.sample(asked, n):
        value = number * FACTORS[big, small]
        found.append({"prompt": f"How many {small} are {number} {big}? End with the number.",
                      "value": value, "answer": f"{number} {big} are {value} {small}: {value}"})
    return found


def verify(rows, answers):
    """1 where the last number of an answer is the right one."""
    return [re.findall(r"\d+", answer)[-1:] == [str(row["value"])] for row, answer in zip(rows, answers, strict=True)]
