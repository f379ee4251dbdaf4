"""Languages by their codes: the script each is written in, and the codes other projects give them."""





# M2M100's languages in the order of their ids, which start where vocab.json ends.
M2M100_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi "
    "hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc "
    "or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()
# NLLB's codes are ISO 639-3 and script; these go by a short one too.
NLLB_CODES = dict(pair.split(":") for pair in (
    "am:amh_Ethi ar:arb_Arab bg:bul_Cyrl bn:ben_Beng cs:ces_Latn da:dan_Latn de:deu_Latn el:ell_Grek "
    "en:eng_Latn es:spa_Latn fa:pes_Arab fi:fin_Latn fr:fra_Latn ha:hau_Latn he:heb_Hebr hi:hin_Deva "
    "hu:hun_Latn id:ind_Latn ig:ibo_Latn it:ita_Latn ja:jpn_Jpan km:khm_Khmr ko:kor_Hang lo:lao_Laoo "
    "ms:zsm_Latn my:mya_Mymr ne:npi_Deva nl:nld_Latn no:nob_Latn pl:pol_Latn pt:por_Latn ro:ron_Latn "
    "ru:rus_Cyrl so:som_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu th:tha_Thai tl:tgl_Latn "
    "tr:tur_Latn uk:ukr_Cyrl ur:urd_Arab vi:vie_Latn wo:wol_Latn xh:xho_Latn yo:yor_Latn zh:zho_Hans "
    "zu:zul_Latn").split())
# Language, or NLLB's script tag -> first word of the Unicode names of its letters. What is not here is Latin.
SCRIPTS = {word: line.split()[0] for line in (
    "CJK zh Hans Hant", "HANGUL ko Hang", "KANA ja Jpan", "CYRILLIC ba be bg kk mk mn ru sr uk Cyrl",
    "GREEK el Grek", "ARABIC ar fa ps sd ur Arab", "HEBREW he yi Hebr", "DEVANAGARI hi mr ne Deva",
    "BENGALI bn Beng", "GUJARATI gu Gujr", "GURMUKHI pa Guru", "TAMIL ta Taml", "TELUGU Telu",
    "KANNADA kn Knda", "MALAYALAM ml Mlym", "ORIYA or Orya", "SINHALA si Sinh", "ETHIOPIC am Ethi",
    "ARMENIAN hy Armn", "GEORGIAN ka Geor", "THAI th Thai", "LAO lo Laoo", "KHMER km Khmr",
    "MYANMAR my Mymr", "TIBETAN Tibt", "TIFINAGH Tfng", "OL Olck") for word in line.split()[1:]}
KANA = ("HIRAGANA", "KATAKANA", "CJK")
UNSPACED = ("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without spaces between sentences


def script_of(language: str) -> str:
    return SCRIPTS.get(language) or SCRIPTS.get(language[-4:], "LATIN")
