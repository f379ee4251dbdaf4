"""One table of languages: how each is spelt in codes and in English, and the script it is written in.

    normal("zh-CN") == normal("zho_Hans") == normal("cmn") == normal("Chinese") == "zh"
    normal("zh-TW") == "zh_Hant";  normal("sr-Latn") == "sr_Latn";  normal("pt-BR") == "pt"
    script_of("te") == "TELUGU";  script_of("zho_Hant") == "CJK";  script_of("xx") is None

A *normal code* is ISO 639-1's or, where that has none, ISO 639-3's; a script that is not the language's
usual one follows: a text in traditional characters is no answer to a simplified question. Regions are dropped
(pt-BR and pt-PT are one language here), but for those that mean a script: zh-TW, zh-HK and zh-MO. What the
table lacks stays as it is: data may hold any key, and the script of an unknown language is unknown.

Sources: FLORES-200 and NLLB (Costa-jussa et al. 2022), ISO 639, IETF BCP 47, M2M100 (Fan et al. 2021).
"""

import difflib
import re
import unicodedata
from functools import lru_cache

from engine.files import InputError

# One entry a language and script: normal code, NLLB's and FLORES's code, other codes, names with a capital.
# NLLB lacks br and fy, whose second codes are made like its own, and calls Santali in Ol Chiki sat_Beng.
TABLE = """
ace ace_Latn Acehnese; ace_Arab ace_Arab; acm acm_Arab Mesopotamian_Arabic; acq acq_Arab Taizzi-Adeni_Arabic;
aeb aeb_Arab Tunisian_Arabic; af afr_Latn afr Afrikaans; ajp ajp_Arab South_Levantine_Arabic;
ak aka_Latn aka Akan; am amh_Ethi amh Amharic; apc apc_Arab North_Levantine_Arabic;
ar arb_Arab arb ara Arabic Modern_Standard_Arabic; ar_Latn arb_Latn; ars ars_Arab Najdi_Arabic;
ary ary_Arab Moroccan_Arabic; arz arz_Arab Egyptian_Arabic; as asm_Beng asm Assamese;
ast ast_Latn Asturian; awa awa_Deva Awadhi; ay ayr_Latn ayr aym Aymara Central_Aymara;
az azj_Latn azj aze Azerbaijani North_Azerbaijani; azb azb_Arab South_Azerbaijani; ba bak_Cyrl bak Bashkir;
bm bam_Latn bam Bambara; ban ban_Latn Balinese; be bel_Cyrl bel Belarusian; bem bem_Latn Bemba;
bg bul_Cyrl bul Bulgarian; bho bho_Deva Bhojpuri; bjn bjn_Latn Banjar; bjn_Arab bjn_Arab;
bn ben_Beng ben Bengali Bangla; bn_Latn ben_Latn; bo bod_Tibt bod tib Tibetan; br bre_Latn bre Breton;
bs bos_Latn bos Bosnian; bug bug_Latn Buginese; ca cat_Latn cat Catalan Valencian; ceb ceb_Latn Cebuano;
cjk cjk_Latn Chokwe; ckb ckb_Arab Sorani Central_Kurdish; crh crh_Latn Crimean_Tatar;
cs ces_Latn ces cze Czech; cy cym_Latn cym wel Welsh; da dan_Latn dan Danish; de deu_Latn deu ger German;
din dik_Latn dik Dinka Southwestern_Dinka; dyu dyu_Latn Dyula; dz dzo_Tibt dzo Dzongkha;
ee ewe_Latn ewe Ewe; el ell_Grek ell gre Greek; en eng_Latn eng English; eo epo_Latn epo Esperanto;
es spa_Latn spa Spanish Castilian; et est_Latn est ekk Estonian; eu eus_Latn eus baq Basque;
fa pes_Arab pes fas per Persian Farsi Western_Persian; ff fuv_Latn fuv ful Fulah Fula Nigerian_Fulfulde;
fi fin_Latn fin Finnish; fj fij_Latn fij Fijian; fo fao_Latn fao Faroese; fon fon_Latn Fon;
fr fra_Latn fra fre French; fur fur_Latn Friulian; fy fry_Latn fry Western_Frisian Frisian;
ga gle_Latn gle Irish; gd gla_Latn gla Scottish_Gaelic Gaelic; gl glg_Latn glg Galician;
gn grn_Latn grn gug Guarani; gu guj_Gujr guj Gujarati; ha hau_Latn hau Hausa;
he heb_Hebr heb iw Hebrew; hi hin_Deva hin Hindi; hi_Latn hin_Latn; hne hne_Deva Chhattisgarhi;
hr hrv_Latn hrv Croatian; ht hat_Latn hat Haitian Haitian_Creole; hu hun_Latn hun Hungarian;
hy hye_Armn hye arm Armenian; id ind_Latn ind in Indonesian; ig ibo_Latn ibo Igbo;
ilo ilo_Latn Ilocano Iloko; is isl_Latn isl ice Icelandic; it ita_Latn ita Italian;
ja jpn_Jpan jpn Japanese; jv jav_Latn jav jw Javanese; ka kat_Geor kat geo Georgian; kab kab_Latn Kabyle;
kac kac_Latn Jingpho Kachin; kam kam_Latn Kamba; kbp kbp_Latn Kabiye; kea kea_Latn Kabuverdianu;
kg kon_Latn kon Kongo Kikongo; ki kik_Latn kik Kikuyu; kk kaz_Cyrl kaz Kazakh;
km khm_Khmr khm Khmer; kmb kmb_Latn Kimbundu; kn kan_Knda kan Kannada; ko kor_Hang kor Korean;
kr knc_Latn knc kau Kanuri Central_Kanuri; kr_Arab knc_Arab; ks kas_Arab kas Kashmiri; ks_Deva kas_Deva;
ku kmr_Latn kmr kur Kurdish Kurmanji Northern_Kurdish; ky kir_Cyrl kir Kyrgyz Kirghiz;
lb ltz_Latn ltz Luxembourgish; lg lug_Latn lug Ganda Luganda; li lim_Latn lim Limburgish;
lij lij_Latn Ligurian; lmo lmo_Latn Lombard; ln lin_Latn lin Lingala; lo lao_Laoo lao Lao;
lt lit_Latn lit Lithuanian; ltg ltg_Latn Latgalian; lua lua_Latn Luba-Kasai Tshiluba; luo luo_Latn Luo;
lus lus_Latn Mizo; lv lvs_Latn lvs lav Latvian Standard_Latvian; mag mag_Deva Magahi; mai mai_Deva Maithili;
mg plt_Latn plt mlg Malagasy Plateau_Malagasy; mi mri_Latn mri mao Maori; min min_Latn Minangkabau;
min_Arab min_Arab; mk mkd_Cyrl mkd mac Macedonian; ml mal_Mlym mal Malayalam;
mn khk_Cyrl khk mon Mongolian Halh_Mongolian; mni mni_Beng Meitei Manipuri; mos mos_Latn Mossi;
mr mar_Deva mar Marathi; ms zsm_Latn zsm msa may Malay Standard_Malay; mt mlt_Latn mlt Maltese;
my mya_Mymr mya bur Burmese; ne npi_Deva npi nep Nepali; ne_Latn npi_Latn; nl nld_Latn nld dut Dutch Flemish;
nn nno_Latn nno Nynorsk Norwegian_Nynorsk; no nob_Latn nob nb nor Norwegian Bokmal Norwegian_Bokmal;
nso nso_Latn ns Northern_Sotho Sepedi; nus nus_Latn Nuer; ny nya_Latn nya Nyanja Chichewa Chewa;
oc oci_Latn oci Occitan; om gaz_Latn gaz orm Oromo West_Central_Oromo; or ory_Orya ory ori Odia Oriya;
pa pan_Guru pan Punjabi Panjabi Eastern_Panjabi; pag pag_Latn Pangasinan; pap pap_Latn Papiamento;
pl pol_Latn pol Polish; prs prs_Arab Dari; ps pbt_Arab pbt pus Pashto Southern_Pashto;
pt por_Latn por Portuguese Brazilian_Portuguese; qu quy_Latn quy que Quechua Ayacucho_Quechua;
rn run_Latn run Rundi Kirundi; ro ron_Latn ron rum mo Romanian Moldovan; ru rus_Cyrl rus Russian;
rw kin_Latn kin Kinyarwanda; sa san_Deva san Sanskrit; sat sat_Olck sat_Beng Santali;
sc srd_Latn srd Sardinian; scn scn_Latn Sicilian; sd snd_Arab snd Sindhi; sg sag_Latn sag Sango;
shn shn_Mymr Shan; si sin_Sinh sin Sinhala Sinhalese; si_Latn sin_Latn; sk slk_Latn slk slo Slovak;
 sl slv_Latn slv Slovenian;
sm smo_Latn smo Samoan; sn sna_Latn sna Shona; so som_Latn som Somali;
sq als_Latn als sqi alb Albanian Tosk_Albanian; sr srp_Cyrl srp Serbian; sr_Latn srp_Latn;
ss ssw_Latn ssw Swati Swazi; st sot_Latn sot Sotho Southern_Sotho Sesotho; su sun_Latn sun Sundanese;
sv swe_Latn swe Swedish; sw swh_Latn swh swa Swahili Kiswahili; szl szl_Latn Silesian;
ta tam_Taml tam Tamil; taq taq_Latn Tamasheq; taq_Tfng taq_Tfng; te tel_Telu tel Telugu;
tg tgk_Cyrl tgk Tajik; th tha_Thai tha Thai; ti tir_Ethi tir Tigrinya; tk tuk_Latn tuk Turkmen;
tl tgl_Latn tgl fil Tagalog Filipino; tn tsn_Latn tsn Tswana Setswana; tpi tpi_Latn Tok_Pisin;
tr tur_Latn tur Turkish; ts tso_Latn tso Tsonga; tt tat_Cyrl tat Tatar; tum tum_Latn Tumbuka;
tw twi_Latn twi Twi; tzm tzm_Tfng Central_Atlas_Tamazight; ug uig_Arab uig Uyghur Uighur;
uk ukr_Cyrl ukr Ukrainian; umb umb_Latn Umbundu; ur urd_Arab urd Urdu; ur_Latn urd_Latn;
uz uzn_Latn uzn uzb Uzbek Northern_Uzbek; vec vec_Latn Venetian; vi vie_Latn vie Vietnamese;
war war_Latn Waray; wo wol_Latn wol Wolof; xh xho_Latn xho Xhosa; yi ydd_Hebr ydd yid ji Yiddish;
yo yor_Latn yor Yoruba; yue yue_Hant Cantonese Yue_Chinese;
zh zho_Hans zho chi cmn Chinese Simplified_Chinese Chinese_Simplified Mandarin;
zh_Hant zho_Hant Traditional_Chinese Chinese_Traditional;
zu zul_Latn zul Zulu
"""

# M2M100's languages in the order of their ids, which start where vocab.json ends. Its ns is ISO's nso.
M2M100_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi "
    "hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc "
    "or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()

# ISO 15924's script tag -> first word of the Unicode names of its letters.
SCRIPTS = dict(pair.split(":") for pair in (
    "Arab:ARABIC Armn:ARMENIAN Beng:BENGALI Cyrl:CYRILLIC Deva:DEVANAGARI Ethi:ETHIOPIC Geor:GEORGIAN "
    "Grek:GREEK Gujr:GUJARATI Guru:GURMUKHI Hang:HANGUL Hans:CJK Hant:CJK Hebr:HEBREW Jpan:KANA Khmr:KHMER "
    "Knda:KANNADA Laoo:LAO Latn:LATIN Mlym:MALAYALAM Mymr:MYANMAR Olck:OL Orya:ORIYA Sinh:SINHALA "
    "Taml:TAMIL Telu:TELUGU Tfng:TIFINAGH Thai:THAI Tibt:TIBETAN").split())
# First words that mean another one's script; Japanese is written in KANA and CJK.
SAME_SCRIPT = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA", "IDEOGRAPHIC": "CJK",
               "KANGXI": "CJK"}
UNSPACED = ("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without spaces between words
DENSE = ("CJK", "KANA")                                        # and without any between sentences
TRADITIONAL = ("TW", "HK", "MO")                               # regions whose Chinese is zh_Hant


def fold(spelling: str) -> str:
    """Small letters, one "_" for everything between them: "Chinese (Simplified)" -> "chinese_simplified"."""
    return "_".join(re.findall(r"[^\W_]+", spelling.casefold()))


@lru_cache(maxsize=1)
def spellings() -> tuple[dict[str, str], dict[str, str]]:
    """({folded spelling: normal code}, {normal code: NLLB's code})."""
    known, nllb = {}, {}
    for entry in TABLE.replace("\n", " ").split(";"):
        code, flores, *others = entry.split()
        nllb[code] = flores
        for spelling in (code, flores, *others):
            assert known.setdefault(fold(spelling), code) == code, f"{spelling} has two languages"
    return known, nllb


@lru_cache(maxsize=1 << 12)
def normal(code: str) -> str:
    """The normal code of a language's code or English name, in any case, with "-" or "_", with or without
    script and region. What is no known language stays as it is."""
    known, nllb = spellings()
    folded = fold(code)
    if folded in known:
        return known[folded]
    language, *rest = folded.split("_")
    script = rest.pop(0).title() if rest and rest[0].title() in SCRIPTS else ""
    region = rest.pop(0).upper() if rest and re.fullmatch(r"[a-z]{2}|\d{3}", rest[0]) else ""
    if rest or language not in known or "," in code:
        return code
    own = known[language]
    if own == "zh" and not script and region in TRADITIONAL:
        script = "Hant"
    usual = nllb[own].endswith(script)
    return own if usual else known.get(fold(f"{own}_{script}"), f"{own}_{script}")


def nllb_code(code: str) -> str:
    """NLLB's and FLORES's code of a language; an unknown one stays as it is."""
    return spellings()[1].get(normal(code), code)


def suggestion(code: str, there) -> str:
    """Of the languages `there`, the one that `code` may have meant: " (did you mean sw?)", or nothing."""
    names = {fold(name): name for name in there}
    names |= {spelling: names[own] for spelling, own in spellings()[0].items() if own in names}
    near = difflib.get_close_matches(fold(normal(code)), names, 1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def split_commas(text: str) -> list[str]:
    """The parts of "sw, yo," without the spaces around them and without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def language_list(text: str) -> list[str]:
    """The normal codes that a flag names, joined by commas. InputError where there is none."""
    codes = [normal(code) for code in split_commas(text)]
    if not codes:
        raise InputError(f"--lang {text!r}: a language was expected, or several joined by commas: sw,yo")
    return codes


def script_of(language: str) -> str | None:
    """The script of a language, named as `letter_script` does; None where it is not known."""
    return SCRIPTS.get(nllb_code(language)[-4:])


@lru_cache(maxsize=1 << 16)
def letter_script(char: str) -> str:
    """The first word of a letter's Unicode name, full and half width alike: LATIN, CJK, KANA, ..."""
    word = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "?").split()[0]
    return SAME_SCRIPT.get(word, word)
