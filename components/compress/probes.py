"""Fixed texts that a compressed model is proved on: English and Chinese, short and long.

They only have to drive every layer through ordinary language; whether the model is any good is for
evaluate to say, on test.
"""

from __future__ import annotations

from typing import Any

from components.shared import chat

_DIALOGUES = (
    ("What must a seller tell a buyer about a known defect?", "The seller must disclose it before the sale."),
    ("公司拖欠工资三个月，员工应当怎么办？", "员工可以向劳动行政部门投诉，也可以依法申请劳动仲裁。"),
    ("Summarise: profits rose by 12% while costs were flat.", "Profits grew 12% and costs did not change."),
    ("判断适用的法条：被告人多次入户盗窃，数额较大。", "适用刑法关于盗窃罪的规定。"),
    ("Translate to Chinese: The contract ends on 31 March.", "合同于三月三十一日终止。"),
    ("借款合同没有约定利息，出借人能否要求支付利息？", "没有约定利息的，视为没有利息。"),
    ("def add(a, b):", "    return a + b"),
    ("水在标准大气压下的沸点是多少摄氏度？", "一百摄氏度，因为此时饱和蒸气压等于大气压。"),
    (
        "The tenant left two months before the lease ended and took the keys. What may the landlord claim?",
        "Rent until the flat was let again, at most for the two months, less what the landlord saved.",
    ),
    (
        "甲向乙借款五万元，约定一年后归还，到期后乙多次催要，甲以经营困难为由拒绝。乙应当如何维护自己的权利？",
        "乙可以先与甲协商分期还款；协商不成的，可以凭借条、转账记录等证据，向甲住所地的人民法院提起诉讼。",
    ),
)
_SENTENCES = (
    "The company reported a quarterly loss after writing down its overseas assets.",
    "Shareholders approved the merger of the two banks at a special meeting.",
    "Crude prices fell as producers failed to agree on lower output.",
    "The central bank bought dollars to slow the rise of the yen.",
    "Wheat exports are expected to reach four million tonnes this season.",
    "A strike at the port delayed container ships for nine days.",
    "The board declared a dividend of twelve cents a share, payable in April.",
    "Ministers warned that new tariffs would hurt trade between both countries.",
    "The film was far too long, and nobody in the hall laughed once.",
    "I love this phone; the battery lasts two full days.",
    "Interest rates were cut by a quarter point to support growth.",
    "Engineers found a leak in the cooling system and stopped the reactor.",
    "这家酒店的服务很好，下次还会再来。",
    "物流太慢了，包装也破了，非常失望。",
    "双方签订合同后，甲方未按约定支付货款。",
    "央行宣布下调存款准备金率，以支持实体经济。",
)


def dialogues(tokenizer: Any) -> list[list[int]]:
    """Token ids of whole dialogues, rendered as in training: a few hundred tokens together."""
    return [
        chat.prompt_ids(tokenizer, [{"role": "user", "content": question}])
        + chat.answer_ids(tokenizer, answer)
        for question, answer in _DIALOGUES
    ]


def texts() -> list[str]:
    """64 texts of one to eight sentences, so that a batch of them is ragged."""
    count = len(_SENTENCES)
    return [
        " ".join(_SENTENCES[(start + step) % count] for step in range(length))
        for length in (1, 2, 4, 8)
        for start in range(count)
    ]
