#include "held_log.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace laprox_python {

namespace {

struct document {
    std::unique_ptr<laprox_document, decltype(&laprox_document_free)> c;

    explicit document(laprox_document * owned) : c(owned, laprox_document_free) {}
};

}

// Paths are bytes as the system has them (os.fsencode); refusals don't repeat them.
void register_document(py::module_ & m) {
    py::class_<document>(m, "Document")
        .def(py::init([](const std::string & path) {
            const char * c_path = whole("the path", path);
            document opened(nullptr);
            require_meanwhile([&] {
                opened.c.reset(laprox_document_open(c_path));
                return opened.c != nullptr;
            });
            return opened;
        }), py::arg("path"))
        .def("get", [](const document & d, const std::string & key) -> std::optional<std::string> {
            const char * text = laprox_document_get(d.c.get(), key.c_str());
            return text ? std::optional<std::string>(text) : std::nullopt;
        }, py::arg("key"))
        .def("tokens", [](const document & d) {
            std::vector<llama_token> tokens(laprox_document_tokens(d.c.get(), nullptr, 0));
            laprox_document_tokens(d.c.get(), tokens.data(), (int32_t) tokens.size());
            return tokens;
        })
        .def("load", [](const document & d, uintptr_t ctx, llama_seq_id seq_id) {
            require_meanwhile([&, c = context_at(ctx)] { return laprox_document_load(c, seq_id, d.c.get()); });
        }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("document_save", [](uintptr_t ctx, const std::string & path, const std::vector<llama_token> & tokens,
                              const std::map<std::string, std::string> & texts, llama_seq_id seq_id) {
        const char * c_path = whole("the path", path);
        const c_texts told(texts);
        require_meanwhile([&, c = context_at(ctx)] {
            return laprox_document_save(c, seq_id, c_path, tokens.data(), (int32_t) tokens.size(), told.keys.data(), told.values.data(), (int32_t) texts.size());
        });
    }, py::arg("ctx"), py::arg("path"), py::arg("tokens"), py::arg("texts"), py::arg("seq_id") = 0);
}

}
