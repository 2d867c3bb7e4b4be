"""DeepScaleR's rule for math answers, which the authors' released code runs in place of the evaluator that the paper names.

The last box after the last "Answer:" must equal the truth, as a text cleaned in one way or by sympy cleaned in another.
Written anew from what the released rule decides, oddities included. Departures: LaTeX becomes plain text by the few
commands in `SIGNS` (released: pylatexenc, which knows all of them); nothing with "__" or quotes in it is evaluated; and
a box inside of <think> never counts (released: it does after an "Answer:" in there, where the answer itself has neither).
It must run where it can be killed: `math.verify` does, in the worker.
"""
from __future__ import annotations

import re
from collections.abc import Iterator

UNITS = ("degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot",
         "feet", "inch", "yard")
SIGNS = {"pi": "pi", "infty": "inf", "cup": "U", "cdot": "*", "times": "*", "div": "÷", "pm": "±", "le": "≤", "leq": "≤",
         "ge": "≥", "geq": "≥", "ne": "≠", "in": "∈", "circ": "∘", "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ",
         "theta": "θ", "lambda": "λ", "mu": "μ", "phi": "ϕ", "omega": "ω", "%": "%", "{": "{", "}": "}", "$": "$", "&": "&"}
HARD = (r"\^\{", r"\^\(", r"\^[0-9]+\^", r"\^[0-9][0-9]+", "__", "['\"]")  # what sympy is not asked about
BRACKETS = "()[]"


def right(answer: str, truth: str) -> tuple[bool, str | None]:
    """Whether an answer is right, and what stands in its box; None where it has none. May take for ever."""
    found = boxed(_solution(answer))
    gold = boxed(truth) if "\\boxed" in truth else truth
    if found is None or not gold:
        return False, found
    return _by_text(found) == _by_text(gold) or _same_value(gold, found), found


def boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{}`; None where there is none, or it is not closed. Escaped braces count as braces."""
    begin, depth = text.rfind("\\boxed"), 0
    if begin < 0 or not text.startswith("\\boxed{", begin):
        return None
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            return text[begin + len("\\boxed{"):end]
    return None


def _solution(answer: str) -> str:
    if "Answer:" in answer:
        return answer.split("Answer:")[-1].strip()
    return answer.split("###Response")[1] if "###Response" in answer else answer


# --- equal as texts


def _by_text(answer: str) -> str:
    """An answer as Hendrycks' MATH compares it; only partly cleaned where it has a form that the rule stumbles on."""
    text = _inside_text(answer.strip()).strip()
    try:
        return _cleaned(text)
    except (ValueError, IndexError):
        return text


def _inside_text(text: str) -> str:
    whole = re.search(r"^\\text\{(.+?)\}$", text)
    return whole[1] if whole else text


def _cleaned(text: str) -> str:
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
                     ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):
        text = text.replace(old, new)
    if "\\text{ " in text:  # a unit on the right
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, sign, value = text.partition("=")
    if sign and "=" not in value and len(name) <= 2:  # "x=5"
        text = value
    text = _fractions(_roots(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def _roots(text: str) -> str:
    """`\\sqrt3` becomes `\\sqrt{3}`; IndexError where nothing follows."""
    first, *parts = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in parts)


def _fractions(text: str) -> str:
    """`\\frac12` becomes `\\frac{1}{2}`; IndexError where nothing follows one, and all stay where one sign does."""
    first, *parts = text.split("\\frac")
    found = first
    for part in parts:
        if part[0] != "{":
            if len(part) < 2:
                return text
            part = "{" + part[0] + "}" + (part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:])
        found += "\\frac" + part
    return found


# --- equal by sympy


def _same_value(gold: str, given: str) -> bool:
    """Part by part for tuples and intervals; whole numbers and fractions must agree as they are written."""
    gold, given = _normal(gold), _normal(given)
    if gold == given:
        return True
    if not given:
        return False
    golds, givens = _elements(gold), _elements(given)
    if len(golds) != len(givens) or (len(golds) > 1 and (gold[0], gold[-1]) != (given[0], given[-1])):
        return False
    return all(_same_element(a, b) for a, b in zip(golds, givens, strict=True))


def _same_element(gold: str, given: str) -> bool:
    if all(re.search(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$", text) for text in (gold, given)):
        return gold == given  # a fraction that is not reduced is wrong
    if _is_whole(gold) != _is_whole(given):
        return False
    return _zero(f"({gold})-({given})")


def _zero(expression: str) -> bool:
    """Whether sympy finds that an expression is 0; False for one that it is not asked about, or cannot read."""
    letters = {char for char in expression.replace("sqrt", "").replace("frac", "") if char.isalpha()}
    if len(letters) > 2 or any(re.search(hard, expression) for hard in HARD):
        return False
    import sympy
    from sympy.parsing import sympy_parser as parser
    rules = (*parser.standard_transformations, parser.implicit_multiplication_application)
    try:
        return bool(sympy.simplify(parser.parse_expr(expression.replace("^", "**"), transformations=rules)) == 0)
    except Exception:  # the parser evaluates a model's text, which may raise anything; the released rule lets it pass too
        return False


def _normal(text: str) -> str:
    """Without units, currency, case, spaces and braces; large numbers by name and mixed numbers written out."""
    text = _inside_text(text)
    for old, new in (("\\%", "%"), ("\\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "),
                     ("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12")):
        text = text.replace(old, new)
    for unit in UNITS:
        text = re.sub(rf"{unit}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if _whole(text) is not None:
        text = str(_whole(text))
    if "\\" in text:
        text = "".join(_plain(re.sub(r"\\[td]frac", r"\\frac", text).replace("\\frac", " \\frac"))).strip()
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)
    text = re.sub("[ {}]", "", text).lower()
    return str(int(float(text.replace(",", "")))) if _is_whole(text) else text


def _whole(text: str) -> int | None:
    """The whole number that Python's float reads, to a ten-millionth; None for any other text."""
    try:
        value = float(text)
        return round(value) if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):  # no number, or no finite one
        return None


def _is_whole(text: str) -> bool:
    return _whole(_without_commas(text)) is not None


def _without_commas(text: str) -> str:
    """`1,234,567` as `1234567`; the commas of a tuple stay."""
    while (shorter := re.sub(r"(\d),(\d\d\d)($|\D)", r"\1\2\3", text)) != text:
        text = shorter
    return text


def _elements(text: str) -> list[str]:
    text = _without_commas(text)
    inside = text[1:-1]
    if len(text) > 2 and text[0] in BRACKETS and text[-1] in BRACKETS and not set(inside) & set(BRACKETS):
        return [part.strip() for part in inside.split(",")]
    return [text] if text else []


def _plain(latex: str) -> Iterator[str]:
    """LaTeX as plain text, in pieces: `\\frac{a}{b}` is a/b, `\\sqrt{a}` is sqrt(a), other commands their sign or nothing."""
    while latex:
        command = re.match(r"\\([A-Za-z]+\s*|.|$)", latex, re.DOTALL)
        if command is None:
            yield "" if latex[0] in "{}" else {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}.get(
                latex[0], latex[0])
            latex = latex[1:]
            continue
        name, latex = command[1].strip(), latex[command.end():]
        if name == "frac":
            above, latex = _argument(latex)
            below, latex = _argument(latex)
            yield "".join([*_plain(above), "/", *_plain(below)])
        elif name == "sqrt":
            latex = re.sub(r"^\[[^]]*\]", "", latex)
            inside, latex = _argument(latex)
            yield "".join(["sqrt(", *_plain(inside), ")"])
        else:
            yield SIGNS.get(name, "")


def _argument(latex: str) -> tuple[str, str]:
    """(argument, rest): a group in braces, a command, or one sign."""
    latex = latex.lstrip()
    depth = 0
    if not latex.startswith("{"):
        end = re.match(r"\\[A-Za-z]+|\\?.|$", latex, re.DOTALL).end()
        return latex[:end], latex[end:]
    for end, char in enumerate(latex):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return latex[1:end], latex[end + 1:]
    return latex[1:], ""
