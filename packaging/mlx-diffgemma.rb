# Not run on a Mac yet, see README.md beside it. The address and the checksum are those of a release
# to come.
class MlxDiffgemma < Formula
  include Language::Python::Virtualenv

  desc "Local-first runtime for DiffusionGemma on Apple silicon, built on MLX"
  homepage "https://github.com/mlx-diffgemma/mlx-diffgemma"
  url "https://files.pythonhosted.org/packages/source/m/mlx-diffgemma/mlx_diffgemma-0.1.0.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  def install
    virtualenv_create(libexec, "python3.13")
    # MLX has no source distribution: what this needs comes as wheels, not as resources.
    system libexec/"bin/python", "-m", "ensurepip"
    system libexec/"bin/python", "-m", "pip", "install", "#{buildpath}[server,mcp]"
    bin.install_symlink libexec/"bin/mlx-diffgemma"
  end

  service do
    run [opt_bin/"mlx-diffgemma", "serve"]
    keep_alive true
    log_path var/"log/mlx-diffgemma.log"
    error_log_path var/"log/mlx-diffgemma.log"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-diffgemma --version")
    answer = shell_output("#{bin}/mlx-diffgemma generate 'What is the capital of Norway?' --seed 0 -q")
    assert_equal "The capital of Norway is Oslo.", answer.strip
  end
end
