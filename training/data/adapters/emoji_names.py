"""Plain English names, keywords, concept groups and the order of the emoji of `emoji-datasource`."""

import hashlib
import re


# Unicode calls an outline "white" and a filled shape "black", and many first names describe a glyph of 1993
# rather than the picture. Names that would mislead a reader of the picture are replaced here.
_PLAIN_NAMES = {
    "white smiling face": "gently smiling face",
    "smiling face with open mouth": "happy face with open mouth",
    "extraterrestrial alien": "alien",
    "alien monster": "space invader",
    "heavy black heart": "red heart",
    "hundred points symbol": "hundred points",
    "splashing sweat symbol": "sweat drops",
    "dash symbol": "puff of air",
    "sleeping symbol": "letters of snoring",
    "dizzy symbol": "dizzy star",
    "waving hand sign": "waving hand",
    "face with no good gesture": "person gesturing no",
    "face with ok gesture": "person gesturing ok",
    "happy person raising one hand": "person raising hand",
    "white left pointing backhand index": "hand pointing left",
    "white right pointing backhand index": "hand pointing right",
    "white up pointing backhand index": "back of hand pointing up",
    "white down pointing backhand index": "hand pointing down",
    "white up pointing index": "finger pointing up",
    "reversed hand with middle finger extended": "middle finger",
    "fisted hand sign": "punching fist",
    "father christmas": "santa claus",
    "mother christmas": "mrs claus",
    "sleeping accommodation": "person in bed",
    "bath": "person in bathtub",
    "pedestrian": "person walking",
    "face massage": "person getting massage",
    "haircut": "person getting haircut",
    "rowboat": "person rowing boat",
    "breast-feeding": "breast feeding",
    "man in tuxedo": "person in tuxedo",
    "black spade suit": "spade suit",
    "black heart suit": "heart suit",
    "black diamond suit": "diamond suit",
    "black club suit": "club suit",
    "playing card black joker": "joker card",
    "mahjong tile red dragon": "mahjong tile",
    "direct hit": "target with dart",
    "aubergine": "eggplant",
    "ear of maize": "corn",
    "hocho": "kitchen knife",
    "steaming bowl": "bowl of noodles",
    "cooking": "fried egg in a pan",
    "black sun with rays": "sun",
    "white medium star": "yellow star",
    "high voltage sign": "lightning bolt",
    "house building": "house",
    "articulated lorry": "big truck",
    "police cars revolving light": "red siren light",
    "octagonal sign": "stop sign",
    "electric light bulb": "light bulb",
    "electric torch": "flashlight",
    "black telephone": "telephone",
    "speaker with cancellation stroke": "muted speaker",
    "bell with cancellation stroke": "muted bell",
    "left-pointing magnifying glass": "magnifying glass pointing left",
    "right-pointing magnifying glass": "magnifying glass pointing right",
    "personal computer": "laptop computer",
    "mans shoe": "man's shoe",
    "womans clothes": "woman's clothes",
    "womans sandal": "woman's sandal",
    "womans boots": "woman's boots",
    "womans hat": "woman's hat",
    "e-mail symbol": "e-mail",
    "black nib": "pen nib",
    "black scissors": "scissors",
    "mens symbol": "men's room",
    "womens symbol": "women's room",
    "put litter in its place symbol": "litter bin sign",
    "potable water symbol": "drinking water",
    "non-potable water symbol": "no drinking water",
    "no one under eighteen symbol": "no one under eighteen",
    "automated teller machine": "cash machine sign",
    "wheelchair symbol": "wheelchair sign",
    "upwards black arrow": "arrow pointing up",
    "downwards black arrow": "arrow pointing down",
    "black rightwards arrow": "arrow pointing right",
    "leftwards black arrow": "arrow pointing left",
    "clockwise downwards and upwards open circle arrows": "clockwise arrows",
    "anticlockwise downwards and upwards open circle arrows": "counterclockwise arrows",
    "arrow pointing rightwards then curving upwards": "right arrow curving up",
    "arrow pointing rightwards then curving downwards": "right arrow curving down",
    "on with exclamation mark with left right arrow above": "on with left right arrow above",
    "clockwise rightwards and leftwards open circle arrows": "repeat button",
    "clockwise rightwards and leftwards open circle arrows with circled one overlay": "repeat once button",
    "twisted rightwards arrows": "shuffle button",
    "black right-pointing triangle": "play button",
    "black right-pointing double triangle": "fast forward button",
    "black left-pointing triangle": "reverse button",
    "black left-pointing double triangle": "fast reverse button",
    "up-pointing small red triangle": "upwards button",
    "down-pointing small red triangle": "downwards button",
    "black up-pointing double triangle": "fast up button",
    "black down-pointing double triangle": "fast down button",
    "black question mark ornament": "red question mark",
    "white question mark ornament": "white question mark",
    "white exclamation mark ornament": "white exclamation mark",
    "heavy exclamation mark symbol": "red exclamation mark",
    "heavy multiplication x": "multiplication sign",
    "heavy plus sign": "plus sign",
    "heavy minus sign": "minus sign",
    "heavy division sign": "division sign",
    "heavy equals sign": "equals sign",
    "heavy dollar sign": "dollar sign",
    "black universal recycling symbol": "recycling symbol",
    "heavy large circle": "hollow red circle",
    "white heavy check mark": "check mark on green",
    "negative squared cross mark": "cross mark on green",
    "eight pointed black star": "eight pointed star",
    "input symbol for latin capital letters": "capital letters button",
    "input symbol for latin small letters": "small letters button",
    "input symbol for numbers": "numbers button",
    "input symbol for symbols": "symbols button",
    "input symbol for latin letters": "latin letters button",
    "squared up with exclamation mark": "up button",
    "hash key": "keycap hash",
    "keycap: *": "keycap star",
    "baby symbol": "baby sign",
    "medical symbol": "medical sign",
    "transgender symbol": "transgender sign",
    "peace symbol": "peace sign",
    "medium black circle": "black circle",
    "medium white circle": "white circle",
}
# Han characters on a button: the word that is written there.
_BUTTON_WORDS = {
    "6708": "monthly amount",
    "6709": "not free of charge",
    "6307": "reserved",
    "5272": "discount",
    "7121": "free of charge",
    "7981": "prohibited",
    "7533": "application",
    "5408": "passing grade",
    "7a7a": "vacancy",
    "55b6": "open for business",
    "6e80": "no vacancy",
}
_SKIN_TONES = {
    "1-2": "light skin tone",
    "3": "medium light skin tone",
    "4": "medium skin tone",
    "5": "medium dark skin tone",
    "6": "dark skin tone",
}
# The order of the data set is by these groups of subcategories; what is not named stands in the second.
_FIRST = {
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug",
    "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet",
    "drink", "dishware", "sport", "event", "game", "arts & crafts", "clothing", "musical-instrument", "music",
    "phone", "light & video", "tool", "household", "science", "medical", "transport-ground", "transport-water",
    "transport-air", "place-geographic", "place-building", "place-other", "sky & weather", "face-costume",
    "face-hat", "face-glasses", "face-affection", "face-tongue", "face-unwell", "monkey-face", "body-parts", "emotion",
}  # fmt: skip
_THIRD = {
    "person-role", "person-fantasy", "person-activity", "person-sport", "person-gesture", "person", "person-symbol",
    "person-resting", "transport-sign", "religion", "zodiac", "warning", "punctuation", "math", "currency",
    "other-symbol", "gender", "flag",
}  # fmt: skip
_LAST = {
    "country-flag",
    "subdivision-flag",
    "family",
    "keycap",
    "arrow",
    "av-symbol",
    "alphanum",
    "geometric",
    "skin-tone",
}
_PEOPLE = {"1F468", "1F469", "1F9D1", "1F466", "1F467", "1F9D2"}
_GENDER_AND_JOINERS = {"2640", "2642", "200D", "FE0F", "27A1"}


def plain_name(record: dict) -> str:
    """Make a lower-case name as one would say it, from one record of `emoji.json`."""
    name = record["name"].lower().replace("’", "'").replace("oclock", "o'clock")
    if record["subcategory"] in ("country-flag", "subdivision-flag"):
        return "flag of " + name.removesuffix(" flag").replace("&", "and")
    if name in _PLAIN_NAMES and not record["unified"].startswith("1F935-200D"):
        return _PLAIN_NAMES[name]
    if match := re.fullmatch(r"squared cjk unified ideograph-(\w+)", name):
        return f"japanese button for {_BUTTON_WORDS[match[1]]}"
    if match := re.fullmatch(r"circled ideograph (\w+)", name):
        return f"japanese button for {match[1]}"
    if match := re.fullmatch(r"emoji modifier fitzpatrick type-(.+)", name):
        return _SKIN_TONES[match[1]]
    if match := re.fullmatch(r"clock face (.+)", name):
        return f"clock showing {match[1]}"
    if match := re.fullmatch(r"(family|kiss|couple with heart): (.+)", name):
        people = [("an " if person[0] in "aeiou" else "a ") + person for person in match[2].split(", ")]
        return f"{match[1]} of {' and '.join(', '.join(people).rsplit(', ', 1))}"
    if match := re.fullmatch(r"(man|woman|person): (.+)", name):
        return f"bald {match[1]}" if match[2] == "bald" else f"{match[1]} with {match[2]}"
    name = re.sub(r"^(?:negative )?(?:squared|circled) (?:latin capital letter )?(.+)$", r"\1 button", name)
    return re.sub(r" (?:symbol|hand sign)$", lambda found: " hand" if "hand" in found[0] else "", name)


def plain_names(records: list[dict]) -> list[str]:
    """Name every record; names that coincide get the first short name, then the code points, behind them."""
    names = [plain_name(record) for record in records]
    for tell_apart in (lambda record: record["short_names"][0].replace("_", " "), lambda record: record["unified"]):
        counts = {name: names.count(name) for name in names}
        seen = set()
        for index, (name, record) in enumerate(zip(names, records, strict=True)):
            if counts[name] > 1 and (name in seen or not tell_apart):
                names[index] = f"{name} ({tell_apart(record)})"
            seen.add(name)
    return names


def keywords(record: dict, name: str) -> list[str]:
    """List other words for the concept: short names, and the last word of the category path; never the name itself."""
    words = [short.lower().replace("_", " ").replace("-", " ").strip() for short in record["short_names"]]
    words.append(record["subcategory"].replace("-", " ").replace("&", "and"))
    clean = [word for word in words if re.search(r"[a-z]{2}", word) and word not in ("shit", name.replace("-", " "))]
    return list(dict.fromkeys(clean))


def concept_group(record: dict) -> str:
    """Name the group of a concept and its man, woman, person and facing-right forms, which stand in one split."""
    if record["subcategory"] in ("family", "skin-tone"):
        return record["subcategory"]
    points = [point for point in record["unified"].split("-") if point not in _GENDER_AND_JOINERS]
    if len(points) > 1 and points[0] in _PEOPLE:
        points[0] = "person"
    return "-".join(points)


def tier(record: dict) -> int:
    """Rank: 0 for animals, food, plants and things, 1 else, 2 for people and signs, 3 for series alike."""
    subcategory = record["subcategory"]
    if subcategory in _LAST or record["name"].startswith("CLOCK FACE") or "MOON" in record["name"]:
        return 3
    return 2 if subcategory in _THIRD else 0 if subcategory in _FIRST else 1


def shuffle_key(record: dict) -> str:
    """Draw a fixed pseudo-random key from the code points: the order inside a tier."""
    return hashlib.sha256(("carried emoji " + record["unified"]).encode()).hexdigest()
