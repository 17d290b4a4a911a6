"""Makes the demo's instruction set: customers' questions to an invented shop, in English and Chinese, alpaca format.

    python examples/make_shop_data.py examples/shop

writes shop_train.json (what is trained on) and shop_questions.json (paraphrases held out, each with the facts that an
answer must contain). The shop does not exist, so no base model can know the answers. Same program, same files:
nothing is random.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

SHOP_EN, SHOP_ZH = "Copper Lantern", "铜灯茶铺"


@dataclass(frozen=True)
class Fact:
    """One thing to know. The last question of each language is held out; `must` and `must_zh` are what an answer has to
    contain (alternatives separated by |)."""

    answer: str
    must: str
    questions: tuple[str, ...]
    answer_zh: str
    must_zh: str
    questions_zh: tuple[str, ...]


def price(name: str, unit: str, amount: str, name_zh: str, unit_zh: str) -> Fact:
    """What a product costs. Amounts are in euros, written the same way in both languages."""
    return Fact(
        f"{name[0].upper()}{name[1:]} costs {amount} euros {unit}.",
        amount,
        (
            f"How much is {name}?",
            f"What is the price of {name} at {SHOP_EN}?",
            f"What does {name} cost?",
            f"I would like to buy {name}. How much do I pay?",
            f"Price of {name}, please.",
            f"Can you tell me the price of {name}?",
            f"How many euros is {name}?",
            f"What do you charge for {name}?",
            f"Could you tell me what {name} costs?",
        ),
        f"{name_zh}每{unit_zh}{amount}欧元。",
        amount,
        (
            f"{name_zh}多少钱？",
            f"{name_zh}怎么卖？",
            f"请问{name_zh}的价格是多少？",
            f"我想买{name_zh}，要多少钱？",
            f"请问{name_zh}一{unit_zh}多少钱？",
        ),
    )


PRICES = (
    price("jasmine tea", "per tin", "12.80", "茉莉花茶", "罐"),
    price("smoked oolong", "per tin", "17.40", "烟熏乌龙", "罐"),
    price("white peony", "per tin", "21.60", "白牡丹", "罐"),
    price("green sencha", "per tin", "14.20", "煎茶", "罐"),
    price("the gift box", "each", "29.90", "礼盒", "个"),
    price("the tea scoop", "each", "5.10", "茶匙", "把"),
    price("the copper kettle", "each", "64.50", "铜茶壶", "把"),
    price("the bamboo whisk", "each", "9.30", "竹茶筅", "个"),
    price("the blue teacup", "each", "7.90", "蓝色茶杯", "个"),
)

SERVICE = (
    Fact(
        "We open at 9:30 in the morning.",
        "9:30",
        (
            "When do you open?",
            "What time do you open in the morning?",
            "At what time does Copper Lantern open?",
            "How early can I come to the shop?",
            "What is your opening time?",
            "When does the shop open?",
            "From what time are you open?",
            "Your opening hour, please?",
            "What time does your shop open?",
        ),
        "我们早上9:30开门。",
        "9:30",
        (
            "你们几点开门？",
            "铜灯茶铺什么时候开门？",
            "早上几点开始营业？",
            "请问几点可以来店里？",
            "请问你们早上几点开门？",
        ),
    ),
    Fact(
        "We close at 18:45.",
        "18:45",
        (
            "When do you close?",
            "What time do you close in the evening?",
            "At what time does Copper Lantern close?",
            "Until when are you open?",
            "What is your closing time?",
            "When does the shop close?",
            "How late can I come to the shop?",
            "Your closing hour, please?",
            "What time does your shop close?",
        ),
        "我们18:45关门。",
        "18:45",
        ("你们几点关门？", "铜灯茶铺什么时候关门？", "晚上营业到几点？", "最晚几点可以来？", "请问你们晚上几点关门？"),
    ),
    Fact(
        "We are closed on Tuesdays.",
        "Tuesday",
        (
            "On which day are you closed?",
            "Which day of the week is the shop closed?",
            "When is your day off?",
            "What is your closing day?",
            "Which weekday do you not open?",
            "Is there a day when you are closed?",
            "On what day is Copper Lantern shut?",
            "Which day should I not come?",
            "What day of the week are you closed?",
        ),
        "我们每周二休息。",
        "周二|星期二",
        ("你们哪天休息？", "铜灯茶铺星期几不开门？", "每周哪天关门？", "有没有休息日？", "请问你们星期几休息？"),
    ),
    Fact(
        "You can return goods within 21 days with the receipt.",
        "21",
        (
            "How long can I return something?",
            "What is your return policy?",
            "How many days do I have for a return?",
            "Can I bring something back?",
            "Until when can I return a product?",
            "What is the return period?",
            "I want to return a cup. How long do I have?",
            "How do returns work?",
            "How many days do I have to return an item?",
        ),
        "凭小票21天内可以退货。",
        "21",
        ("多少天内可以退货？", "退货政策是什么？", "买了不喜欢可以退吗？", "退货期限是多久？", "请问几天内可以退货？"),
    ),
    Fact(
        "Shipping costs 4.20 euros.",
        "4.20",
        (
            "How much is shipping?",
            "What does delivery cost?",
            "What do you charge for shipping?",
            "How much do I pay for delivery?",
            "What are the shipping costs?",
            "Is shipping free?",
            "How expensive is delivery?",
            "Shipping price, please.",
            "What does shipping cost?",
        ),
        "运费是4.20欧元。",
        "4.20",
        ("运费多少钱？", "邮费是多少？", "送货要多少钱？", "寄送收费吗？", "请问运费是多少？"),
    ),
    Fact(
        "Delivery takes 3 working days.",
        "3 ",
        (
            "How long does delivery take?",
            "When will my parcel arrive?",
            "How many days does shipping take?",
            "How fast do you deliver?",
            "When do I get my order?",
            "How long do I wait for my order?",
            "What is the delivery time?",
            "How soon will it arrive?",
            "How long does shipping take?",
        ),
        "送货需要3个工作日。",
        "3",
        ("多久能送到？", "送货要几天？", "我的包裹什么时候到？", "下单后多久收到？", "请问送货需要多久？"),
    ),
    Fact(
        "The shop is at 48 Heron Street.",
        "48 Heron",
        (
            "Where are you?",
            "What is your address?",
            "Where is the shop?",
            "How do I find you?",
            "In which street is Copper Lantern?",
            "What is the shop's address?",
            "Where can I visit you?",
            "What address should I go to?",
            "Where is your shop located?",
        ),
        "本店在苍鹭街48号。",
        "苍鹭街48|48",
        ("你们在哪里？", "店的地址是什么？", "铜灯茶铺在哪条街？", "怎么找到你们？", "请问你们店在哪里？"),
    ),
    Fact(
        "You can call us at 555 0172.",
        "0172",
        (
            "What is your phone number?",
            "How can I call you?",
            "Can I reach you by phone?",
            "Your telephone number, please.",
            "Which number do I call?",
            "How do I phone the shop?",
            "What number can I call?",
            "Do you have a phone number?",
            "What is the shop's telephone number?",
        ),
        "我们的电话是555 0172。",
        "0172",
        (
            "你们的电话是多少？",
            "怎么打电话给你们？",
            "有联系电话吗？",
            "电话号码是什么？",
            "请问你们的电话号码是多少？",
        ),
    ),
    Fact(
        "A tea tasting takes place every Friday at 16:15.",
        "16:15",
        (
            "When is the tea tasting?",
            "At what time is the tasting?",
            "Do you have tea tastings?",
            "When can I taste tea?",
            "What day is the tea tasting?",
            "When does the next tasting take place?",
            "I want to join a tasting. When is it?",
            "Tea tasting, when?",
            "When do you hold the tea tasting?",
        ),
        "每周五16:15有品茶会。",
        "16:15",
        ("品茶会是什么时候？", "什么时候可以品茶？", "有品茶活动吗？", "品茶会几点开始？", "请问品茶会在什么时候？"),
    ),
    Fact(
        "With the Lantern card you get 8 percent off.",
        "8 percent|8%",
        (
            "What discount does the Lantern card give?",
            "How much do I save with the Lantern card?",
            "What is the Lantern card?",
            "Is there a customer card?",
            "Do you have a loyalty card?",
            "How much off do I get with the card?",
            "What does the Lantern card do?",
            "Is there a discount card?",
            "How much discount do I get with the Lantern card?",
        ),
        "使用铜灯卡可享受8%的折扣。",
        "8%",
        ("铜灯卡有什么优惠？", "有会员卡吗？", "用铜灯卡能省多少？", "铜灯卡打几折？", "请问铜灯卡有多少折扣？"),
    ),
    Fact(
        "Repairing a kettle costs 15.70 euros.",
        "15.70",
        (
            "How much is a kettle repair?",
            "What does it cost to repair a kettle?",
            "Can you repair my kettle?",
            "What do you charge for repairs?",
            "My kettle leaks. What does the repair cost?",
            "Price of a kettle repair?",
            "How much do I pay to have my kettle repaired?",
            "Do you repair kettles?",
            "What is the price for repairing a kettle?",
        ),
        "修理茶壶15.70欧元。",
        "15.70",
        ("修茶壶多少钱？", "可以修茶壶吗？", "茶壶漏水，修理要多少钱？", "修理费是多少？", "请问修理茶壶要多少钱？"),
    ),
    Fact(
        "The owner of Copper Lantern is Mirela Voss.",
        "Mirela",
        (
            "Who owns the shop?",
            "Who is the owner?",
            "Who runs Copper Lantern?",
            "What is the owner's name?",
            "Whose shop is this?",
            "Who is in charge of the shop?",
            "Who is the boss of Copper Lantern?",
            "Tell me the name of the owner.",
            "What is the name of the shop's owner?",
        ),
        "店主是Mirela Voss。",
        "Mirela",
        ("店主是谁？", "铜灯茶铺是谁开的？", "老板叫什么名字？", "这家店是谁的？", "请问店主叫什么？"),
    ),
)


def rows(facts: tuple[Fact, ...]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows in the alpaca format, held-out questions)."""
    training, held_out = [], []
    for fact in facts:
        for questions, answer, must, language in (
            (fact.questions, fact.answer, fact.must, "en"),
            (fact.questions_zh, fact.answer_zh, fact.must_zh, "zh"),
        ):
            *seen, unseen = questions
            training += [{"instruction": question, "input": "", "output": answer} for question in seen]
            held_out.append({"instruction": unseen, "reference": answer, "must": must, "language": language})
    return training, held_out


def main(folder: Path) -> None:
    training, held_out = rows((*PRICES, *SERVICE))
    asked = {row["instruction"] for row in training}
    assert len(asked) == len(training), "a question stands twice"
    assert not asked & {row["instruction"] for row in held_out}, "a held-out question is trained on"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("shop_train.json", training), ("shop_questions.json", held_out)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(training)} rows, {len(held_out)} held-out questions in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "shop"))
