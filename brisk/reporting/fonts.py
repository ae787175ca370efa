"""Which fonts have the characters of a text: pictures in Chinese show characters, not boxes."""

# Fonts for what DejaVu Sans lacks, tried in this order before any other.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"]
CJK_FONTS += ["WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei"]
CJK_FONTS += ["PingFang SC", "Hiragino Sans GB", "Noto Sans CJK JP", "Hiragino Sans"]
CJK_FONTS += ["Yu Gothic", "Arial Unicode MS"]


def fonts_for(text):
    """(families, characters none of them has) to write `text` with: DejaVu Sans, which comes with
    matplotlib, and for what it lacks the fonts of this system."""
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font

    families = ["DejaVu Sans"]
    lacking = {character for character in text if character.isprintable()}
    lacking -= characters_of(
        get_font, next(f for f in fontManager.ttflist if f.name == families[0])
    )
    tried = set()
    for look_again in (False, True):
        if lacking and look_again:  # fonts installed since matplotlib made its list
            for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
                try:
                    fontManager.addfont(path)
                except Exception:  # not a font it can read
                    continue
        rank = {name: i for i, name in enumerate(CJK_FONTS)}
        for font in sorted(fontManager.ttflist, key=lambda font: rank.get(font.name, len(rank))):
            if not lacking:
                break
            if font.name in tried or font.name.startswith("Last Resort"):  # it has boxes for all
                continue
            tried.add(font.name)
            if found := lacking & characters_of(get_font, font):
                families.append(font.name)
                lacking -= found
    return families, lacking


def characters_of(get_font, font):
    try:
        return {chr(code) for code in get_font(font.fname).get_charmap()}
    except Exception:  # a file gone or damaged since it was listed
        return set()
