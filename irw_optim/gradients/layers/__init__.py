"""One call of a layer, and its products with G: a class for each kind of layer."""

from ._call import FIRST, LayerCall, Layout, RowWeights
from ._linear import AffineCall, HeadsCall, LinearCall, LinearRowsCall
from ._positions import (
    CONVOLUTION,
    LSTM,
    ChannelNormCall,
    ConvolutionCall,
    LSTMCall,
)
from ._products import summed
from ._rows import (
    ElementwiseCall,
    EmbeddingBagCall,
    EmbeddingCall,
    NormCall,
    RowsCall,
    SampleNormCall,
    VectorCall,
)

__all__ = [
    "CONVOLUTION",
    "FIRST",
    "LSTM",
    "AffineCall",
    "ChannelNormCall",
    "ConvolutionCall",
    "ElementwiseCall",
    "EmbeddingBagCall",
    "EmbeddingCall",
    "HeadsCall",
    "LSTMCall",
    "LayerCall",
    "Layout",
    "LinearCall",
    "LinearRowsCall",
    "NormCall",
    "RowWeights",
    "RowsCall",
    "SampleNormCall",
    "VectorCall",
    "summed",
]
