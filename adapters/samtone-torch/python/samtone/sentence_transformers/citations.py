"""What model cards cite: for each preset the paper that its loss is from."""

from __future__ import annotations

_SAMTONE = """
@inproceedings{moiseev2023samtone,
    title={SamToNe: Improving Contrastive Loss for Dual Encoder Retrieval Models with Same Tower Negatives},
    author={Fedor Moiseev and Gustavo Hernandez Abrego and Peter Dornbach and Imed Zitouni and Enrique Alfonseca and Zhe Dong},
    booktitle={Findings of the Association for Computational Linguistics: ACL 2023},
    year={2023},
}
"""
_INFO_NCE = """
@misc{oord2018representation,
    title={Representation Learning with Contrastive Predictive Coding},
    author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year={2018},
    eprint={1807.03748},
    archivePrefix={arXiv},
}
"""
_OF_PRESETS = {
    "info_nce": _INFO_NCE,
    "bidirectional": """
@inproceedings{yang2019improving,
    title={Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive Margin Softmax},
    author={Yinfei Yang and Gustavo Hernandez Abrego and Steve Yuan and Mandy Guo and Qinlan Shen and Daniel Cer and Yun-hsuan Sung and Brian Strope and Ray Kurzweil},
    booktitle={Proceedings of the Twenty-Eighth International Joint Conference on Artificial Intelligence},
    year={2019},
}
""",
    "clip": """
@inproceedings{radford2021learning,
    title={Learning Transferable Visual Models From Natural Language Supervision},
    author={Alec Radford and Jong Wook Kim and Chris Hallacy and Aditya Ramesh and Gabriel Goh and Sandhini Agarwal and Girish Sastry and Amanda Askell and Pamela Mishkin and Jack Clark and Gretchen Krueger and Ilya Sutskever},
    booktitle={Proceedings of the 38th International Conference on Machine Learning},
    year={2021},
}
""",
    "pair": """
@inproceedings{ren2021pair,
    title={PAIR: Leveraging Passage-Centric Similarity Relation for Improving Dense Passage Retrieval},
    author={Ruiyang Ren and Shangwen Lv and Yingqi Qu and Jing Liu and Wayne Xin Zhao and QiaoQiao She and Hua Wu and Haifeng Wang and Ji-Rong Wen},
    booktitle={Findings of the Association for Computational Linguistics: ACL-IJCNLP 2021},
    year={2021},
}
""",
    "gte": """
@misc{li2023towards,
    title={Towards General Text Embeddings with Multi-stage Contrastive Learning},
    author={Zehan Li and Xin Zhang and Yanzhao Zhang and Dingkun Long and Pengjun Xie and Meishan Zhang},
    year={2023},
    eprint={2308.03281},
    archivePrefix={arXiv},
}
""",
    "qwen3": """
@misc{zhang2025qwen3embedding,
    title={Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation Models},
    author={Yanzhao Zhang and Mingxin Li and Dingkun Long and Xin Zhang and Huan Lin and Baosong Yang and Pengjun Xie and An Yang and Dayiheng Liu and Junyang Lin and Fei Huang and Jingren Zhou},
    year={2025},
    eprint={2506.05176},
    archivePrefix={arXiv},
}
""",
    "decoupled": """
@inproceedings{yeh2022decoupled,
    title={Decoupled Contrastive Learning},
    author={Chun-Hsiao Yeh and Cheng-Yao Hong and Yen-Chi Hsu and Tyng-Luh Liu and Yubei Chen and Yann LeCun},
    booktitle={European Conference on Computer Vision},
    year={2022},
}
""",
}
GRAD_CACHE = """
@inproceedings{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    booktitle={Proceedings of the 6th Workshop on Representation Learning for NLP},
    year={2021},
}
"""
MATRYOSHKA = """
@inproceedings{kusupati2022matryoshka,
    title={Matryoshka Representation Learning},
    author={Aditya Kusupati and Gantavya Bhatt and Aniket Rege and Matthew Wallingford and Aditya Sinha and Vivek Ramanujan and William Howard-Snyder and Kaifeng Chen and Sham Kakade and Prateek Jain and Ali Farhadi},
    booktitle={Advances in Neural Information Processing Systems},
    year={2022},
}
"""


def citation(spec: str) -> str:
    """In BibTeX, for a loss as text. Groups of one's own are a softmax over negatives, which is InfoNCE."""
    preset = spec.partition("(")[0]
    if "|" in spec:
        return _INFO_NCE
    return _SAMTONE if preset.startswith("samtone") else _OF_PRESETS[preset]
