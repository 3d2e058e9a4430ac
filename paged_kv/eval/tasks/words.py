"""Words that haystacks and questions are made of.

None occurs twice, inside another or in RULER's question for common words, so that an answer that
names one names no other. Verbs stand in the past tense.
"""

_ADJECTIVES = """
amber ample ancient angry annual arctic autumn bitter bleak blunt bold brave brief bright brittle
broad broken bronze busy calm candid careful cautious central cheerful chilly circular civil
classic clever cloudy clumsy coastal cold colorful compact complex cool copper costly cozy
cracked crisp crooked crowded cruel curious curly daily damp daring dazzling dear decent deep
delicate dense distant divine dizzy double dreary dusty early earnest eastern elastic elegant
empty endless enormous equal eternal even exact exotic faded faint fair faithful famous fancy
fearless feeble fertile fierce final firm flat floral fluffy foggy foreign formal fragile frank
free fresh friendly frosty frozen frugal full funny fuzzy gaunt gentle giant gifted glad gleaming
glossy golden graceful grand grateful gray greasy great greedy green gritty hairy handy happy
hardy harsh hasty hazy heavy helpful hidden hollow honest huge humble hungry ideal idle immense
innocent ivory jagged jolly joyful keen kind large lasting lavish lazy leafy level liberal light
likely limp little lively local lofty lonely loose loyal lucky lunar magnetic major marble massive
mature meager mellow merry mighty mild misty mobile modern modest moist muddy mute mutual mystic
narrow native neat nervous nimble noble noisy northern novel numb oblong obscure odd olive open
orange ordinary ornate outer oval pale patient peaceful perfect placid plain playful pleasant
plump polite poor precise pretty prime private proper proud prudent public puny pure purple
puzzled quaint quick quiet radiant ragged rapid rare reckless regal remote rigid ripe robust rocky
rotten round royal rugged rural rusty sacred salty sandy scarce scarlet secret serene severe
shabby shady shallow sharp shiny short shrill shy silent silky silver simple sincere sleepy
slender slim slippery slow smart smooth snowy sober soft solar solemn solid sour southern sparse
spicy spiral splendid square stable stale steady steep sticky stiff stormy strange strict strong
stubborn sturdy subtle sudden sunny superb supple sweet swift tame tart tender tepid thick thin
thirsty thorny tidy timid tiny tired tough tranquil tropical true twisted unique upper urban
urgent useful vacant vague vain valid vast velvet verbal vivid warm wary watery weak wealthy weary
western white whole wicked wide wild wise witty wooden worthy yellow young zealous
"""

_NOUNS = """
acorn admiral airport album almond anchor angle animal ankle antler anvil apple apron archer armor
artist atlas attic author avenue badge bagel baker balcony ballad balloon bamboo banana bandit
banjo banner barber bark barley barn barrel basin basket beach beacon beaver bedroom beetle bell
belt bench berry bicycle bishop blanket blossom boat bonfire boot border bottle boulder bowl
bracelet branch brass bread breeze brick bridge broom brother bucket buffalo builder bundle bunker
butcher butter button cabbage cabin cable cactus camel camera canal candle canoe canvas canyon
captain caravan carbon cargo carpet carrot castle cattle cavern cedar cellar cello century ceramic
chain chair chalk chapel chariot cheese cherry chestnut chicken chimney chisel cider cinema circus
citizen clarinet clay clerk cliff clinic clock closet cloth clover coal cobra coconut coffee
collar colony column comet compass concert cookie coral corner cottage cotton couch council
counter cousin cradle crane crater crayon cream creek cricket crocus crown crystal cupboard
curtain cushion custard cyclone cymbal dagger dairy dancer deer delta dentist desert desk diamond
diary dinner doctor dolphin donkey dragon drawer dream drum duchess duck dungeon dwarf eagle
earring echo eclipse editor elbow elder elephant elevator emerald empire engine envelope estate
fabric factory falcon farmer feast feather fence ferry festival fiddle field finger firewood
fisher flag flame flask fleet flint flock flour flute forest fortress fossil fountain fox frame
freight frog fruit furnace gadget galaxy gallery gallon garage garden garlic garment gate gazelle
general geyser ghost ginger giraffe glacier glass glider globe glove goat goblet goose gorilla
granite grape grass gravel grocer grove guard guitar gypsum hammer hammock hamster handle harbor
harvest hawk hazel hedge helmet hermit heron highway hinge hockey honey hook horizon horse
hospital hotel hunter hurdle husband iceberg igloo iguana infant ink inlet insect iron island ivy
jacket jaguar jar jasmine jeweler jigsaw journal judge juice jungle juniper kayak kennel kettle
keyboard kingdom kitchen kite kitten knight ladder lagoon lamp lantern lapel lark lasso lawn
lawyer leather lecture legend lemon lemur leopard letter library lichen lily lime lizard lobby
lobster locket lodge lotus lumber lynx machine magpie mailbox mammal mango mansion mantle maple
market marsh mask mason mattress mayor meadow medal melody melon merchant mermaid meteor midnight
mineral mirror mitten molecule monastery monkey monsoon monument moose morning mosaic mosque moss
motor mountain mouse museum mushroom musket mustard napkin necklace needle nephew nickel nomad
noodle notebook nurse oak oasis oatmeal ocean octopus officer onion opal opera orbit orchard
orchid organ ornament osprey ostrich oven oyster paddle palace palm panda panther papaya paper
parade parcel parent parrot parsley passage pasture path patrol peach peanut pearl pebble pelican
pencil penguin pepper perfume piano pickle picnic pigeon pillar pillow pilot pine pioneer pirate
pistol planet plank plate platform plaza plow pocket poet polar pond pony poplar poppy porch
porridge portrait potato pottery prairie priest prince printer prison propeller pudding puddle
pulley pulpit pumpkin puppet purse pyramid quail quarry quartz queen quill quilt rabbit raccoon
radar radio raft railway raisin raven razor recipe reef referee refuge reptile resort ribbon rice
rider river robin rocket roof root rose rubber ruby ruler runner sack saddle sailor salad salmon
sandal sapphire satchel satin saucer scarf scepter school scissors scooter scout sculptor seagull
season seaweed senator sergeant shadow shark sheep shelf shell shelter shepherd shield shirt shore
shovel shrimp sickle signal singer siren sister skillet skirt skull sleigh sloop smoke snail
socket soldier sonnet soup spade sparrow spear sphere spider spinach spoon spruce squash squirrel
stadium staircase stallion stamp starfish statue steam steel steward stone stool stork stove straw
stream street student sugar suitcase summer sunset surgeon swamp swan sweater sword syrup tailor
tango tavern teacher teapot temple tenant tent theater thimble thistle thread throne thunder
ticket tiger timber toast tobacco tomato tongue topaz torch tornado tortoise towel tower tractor
trader trapeze treasure trellis trench tribe trolley trombone trophy trout trumpet trunk tulip
tundra tunnel turkey turnip turtle twig umbrella uncle unicorn uniform valley vampire vanilla
vault vehicle vendor veranda vessel village vinegar violet violin viper visitor volcano voyage
vulture wagon waiter wallet walnut walrus warden warrior wasp waterfall wax weasel weaver wedding
well whale wheat wheel whip whisker whistle widow willow windmill window winter wizard wolf wrench
writer yacht yard yogurt zebra zephyr zipper
"""

_VERBS = """
admired adopted annoyed answered approached arranged avoided balanced blamed blessed borrowed
bought brought built buried carried carved caught chased cherished chose cleaned climbed collected
combed copied counted covered crossed described dismissed divided drew dropped embraced encircled
examined fetched filled followed forgot gathered greeted guided hauled heated helped hoisted
imitated inspected invited joined jostled kicked knew lifted measured mended mentioned mixed moved
nudged obeyed observed ordered overlooked owned packed painted parked passed patted paused pleased
polished praised preferred preserved protected pulled pursued pushed questioned reached rejected
remembered repaired replaced rescued restored returned rewarded sailed saved scared scrubbed
searched selected shipped sketched smelled sorted spotted squeezed stacked steered studied
surprised tasted thanked tickled tossed touched traced trained trapped trusted visited warned
washed watched weighed welcomed whispered wiped wrapped
"""

ADJECTIVES, NOUNS, VERBS = map(str.split, (_ADJECTIVES, _NOUNS, _VERBS))
