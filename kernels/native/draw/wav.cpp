#include "wav.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "refusal.h"

namespace draw {
namespace {

void put(std::string& file, uint32_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) file.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

std::string encode(const std::vector<float>& wave, uint32_t rate) {
  const auto bytes = static_cast<uint32_t>(2 * wave.size());
  std::string file = "RIFF";
  put(file, 36 + bytes, 4);
  file += "WAVEfmt ";
  put(file, 16, 4);
  put(file, 1, 2);  // PCM
  put(file, 1, 2);  // one channel
  put(file, rate, 4);
  put(file, 2 * rate, 4);
  put(file, 2, 2);
  put(file, 16, 2);
  file += "data";
  put(file, bytes, 4);
  for (const float value : wave) {
    // to even at halves, as PyTorch rounds
    const double level = std::nearbyint(static_cast<double>(value) * 32768);
    const double limited = level < -32768 ? -32768 : level > 32767 ? 32767 : level;
    put(file, static_cast<uint32_t>(static_cast<int32_t>(limited)), 2);
  }
  return file;
}

// 0, or errno of what failed
int write_all(const std::string& path, const std::string& data) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
  if (file < 0) return errno;
  int failure = 0;
  for (size_t done = 0; done < data.size() && failure == 0;) {
    const ssize_t count = write(file, data.data() + done, data.size() - done);
    if (count < 0 && errno != EINTR) failure = errno;
    if (count > 0) done += static_cast<size_t>(count);
  }
  if (failure == 0 && fsync(file) != 0) failure = errno;
  if (close(file) != 0 && failure == 0) failure = errno;
  return failure;
}

}  // namespace

void write_wav(const std::string& path, const std::vector<float>& wave, int64_t sample_rate) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  const std::string temporary = folder + ".fastscore-draw-" + std::to_string(getpid()) + ".tmp";
  int failure = write_all(temporary, encode(wave, static_cast<uint32_t>(sample_rate)));
  if (failure == 0 && std::rename(temporary.c_str(), path.c_str()) != 0) failure = errno;
  if (failure != 0) {
    unlink(temporary.c_str());
    throw Refusal("cannot write " + path + ": " + std::strerror(failure) + "; choose another folder");
  }
}

}  // namespace draw
