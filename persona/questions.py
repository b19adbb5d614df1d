"""What is asked in an interview: topics, and the wordings that the script chooses from."""

from __future__ import annotations

TOPICS = (  # gender comes last, as published; the others in an order of each interview's own
    "age", "country", "occupation", "education", "gender")
# No opening tells anything about Person B: who that is must come from the model alone.
OPENINGS = (
    "Hello, and thank you for taking the time.",
    "Hi there! I talk to strangers for a radio show, and today it is your turn.",
    "Good to meet you. I collect portraits of ordinary people.",
    "Nice weather for once! May I ask you a little about yourself?",
    "Hey, we have a long train ride ahead of us, so tell me who you are.",
    "Welcome to our neighbourhood meeting, I don't think we have met.",
)
# Wordings are drawn by position, so adding one or changing their order gives every seed other
# interviews.
QUESTIONS = {
    "age": (
        "How old are you?",
        "What is your age, if you don't mind my asking?",
        "When is your next birthday, and how old will you be?",
        "Which year of your life are you in right now?",
        "Could you tell me how many years you have lived so far?",
        "Let me put your age into my notes: what should I write?",
    ),
    "country": (
        "Which country do you live in?",
        "Where in the world is your home?",
        "What country are you living in at the moment?",
        "If I sent you a parcel, to which country would it go?",
        "Where do you live these days, and which country is that in?",
        "Tell me about the country that you call home. Which one is it?",
    ),
    "occupation": (
        "What do you do for a living?",
        "What is your job?",
        "How do you spend your working day?",
        "What would your business card say under your name?",
        "Which line of work are you in?",
        "When people ask what you do all week, what do you answer?",
    ),
    "education": (
        "What is the highest level of education that you have finished?",
        "How far did you get at school or university?",
        "Do you have a degree, or which school did you leave last?",
        "Tell me about your education: what was your last school or course?",
        "Which certificate or degree hangs on your wall?",
        "After how much schooling did you stop studying?",
    ),
    "gender": (
        "And how do you describe your gender?",
        "For the form: what gender shall I enter for you?",
        "Do you see yourself as a woman, a man, or something else?",
        "Which gender do you identify with?",
        "One last thing: what is your gender?",
        "Before we part, how would you name your gender?",
    ),
}
FOLLOW_UPS = {  # where an answer said nothing of the topic
    "age": ("A rough number is enough: how many years old?",
            "Just the number, please: what is your age?"),
    "country": ("I meant the country. What is its name?", "Could you name the country for me?"),
    "occupation": ("So what is your profession called?", "What is the name of your job?"),
    "education": ("And which degree or school certificate is that?",
                  "What was the last school that you finished?"),
    "gender": ("Would you say woman, man, or another word?", "In one word, which gender is that?"),
}
SOUGHT = {  # what a model that asks is told to find out
    "age": "how old Person B is",
    # Residence and not origin, as in the rules and in the extraction's message.
    "country": "which country Person B lives in",
    "occupation": "what Person B does for a living",
    "education": "Person B's highest level of education",
    "gender": "how Person B describes their gender",
}
