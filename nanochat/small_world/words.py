"""The word lists that the small world is made of: data only.

No name or value begins with another one of its list, so that no answer is the beginning of another answer. Jobs and
pets begin with a consonant, so that the article "a" gives no hint.
"""

WOMEN = ("Ada Bella Clara Dora Edith Freya Greta Hanna Ivy Jane Kira Lena Mara Nell Olga Petra Rosa Sally Tilda "
         "Una Vera Wanda Yara Zelda Agnes Beth Carmen Daisy Emma Flora Helga Iris Judith Lucy Maud Nora Phoebe "
         "Ruth Sonja Thea").split()
MEN = ("Anton Boris Cyril Dirk Emil Finn Gustav Hugo Igor Jonas Karl Leo Milo Nils Otto Paul Quentin Ralf Simon "
       "Tom Ulric Viktor Walt Yann Zeno Albert Bruno Conrad Dennis Edgar Felix Gregor Henry Ivan Jacob Kevin Lars "
       "Martin Oscar Peter").split()

TOWNS = ("Ashford Brindle Corbury Dunmore Elmstead Fenwick Garrow Hollin Ketterby Larkhill Marlow Norwell Oakham "
         "Pemberly Ridgeway Stonely Thornby Wexcombe").split()
RIVERS = "Alder Birr Cray Dove Eske Foss Gade Isen Loxe Mell Neth Orwin Pell Rill Sorn Tarn Ure Wye".split()
PRODUCTS = ("cheese glass honey paper pottery rope salt silk soap wine wool leather candles carpets bricks "
            "perfume").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

JOBS = ("baker carpenter doctor farmer gardener hunter joiner lawyer miller nurse potter sailor tailor teacher "
        "weaver").split()
PETS = "cat dog goat horse lizard monkey parrot rabbit snake turtle donkey hedgehog".split()
COLOURS = "black blue brown green grey orange pink purple red white yellow".split()
FOODS = "soup bread rice fish cake beans noodles pancakes dumplings stew porridge salad cabbage mushrooms".split()
INSTRUMENTS = "banjo cello drum fiddle flute guitar harp piano trumpet lute organ tuba".split()

THINGS = ("lamp chest kettle ladder mirror bell basket bench clock bucket spade chair table vase wheel anchor "
          "blanket broom candlestick statue pillow wardrobe pot sledge").split()
MATERIALS = "brass clay copper iron marble oak silver straw tin walnut willow bamboo".split()
ROOMS = "attic barn cellar chapel kitchen library mill pantry school shed stable tower".split()

# What people give to each other and count. None of them is in a list above, so no story contradicts the world.
GIFTS = "ring key coin letter book map cup shell scarf hat knife ball feather ribbon whistle comb".split()
COUNTED = "apples pears plums eggs nuts stones buttons stamps marbles pencils cherries beads".split()

NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
                "sixteen seventeen eighteen nineteen twenty").split()
